"""Makes the quickstart data set: supply requests in free text, each answered with one line of strict JSON.

    python recipes/quickstart/make_data.py      # rewrites train.jsonl and eval.jsonl beside this file, always the same

A row is a conversation (`messages`: system, user, assistant). The answer holds, in this order:

    item      str  the thing asked for, copied, in lower case
    quantity  int  2 to 99; the request says "12", "twelve" or "a dozen"
    name      str  who it is for, copied
    day       str  "mon" "tue" "wed" "thu" "fri" "sat" "sun"; the request says the weekday in full

No training row shares its (item, quantity, name, day) with a held-out row, and of every eight held-out rows seven also
have something that training never showed: a sentence, an item, a name, or several of these. A model that memorised
the training rows fails on them.

Items and names are words that SmolLM2's tokenizer splits alike after a space (the request) and after a quote (the
answer). Of "Budapest", one token after a space and "Bud" + "apest" after a quote, a model this small learns to write
"Budgorod": that tests its spelling, not what fine-tuning taught it.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

SEED = 2024
TRAIN_ROWS = 640
EVAL_ROWS = 50
SYSTEM = "Reply with JSON."  # short, and there so that a chat template does not put its own long default

ITEMS = (
    "office chairs", "paper cups", "rain jackets", "water bottles", "phone chargers", "glass jars", "floor mats",
    "safety vests", "work gloves", "light bulbs", "door handles", "wall clocks", "soup bowls", "running shoes",
    "picture frames", "power drills", "plastic crates", "extension cords", "storage bins", "first aid kits",
    "metal shelves", "white shirts", "blue pens", "hand towels", "fire blankets", "snow boots", "air filters",
    "gas heaters", "rice cookers", "apple trees", "flower pots", "clay pots", "tin boxes", "wood planks",
    "card holders", "photo frames", "mouse pads", "table lamps", "bed sheets", "bath mats", "window blinds",
    "wall hooks", "school bags", "music stands", "bread knives", "fish tanks", "milk jugs", "wine glasses", "car seats",
    "train tickets", "road signs", "solar panels", "pipe clamps", "tool boxes", "key rings", "ladders", "backpacks",
    "umbrellas", "toasters", "winter coats",
)  # fmt: skip
UNSEEN_ITEMS = (
    "stone vases", "paper bags", "glass bowls", "metal trays", "door locks", "round tables", "cutting boards",
    "travel bags", "fishing nets", "dish racks", "sun hats", "security cameras", "door mats", "black shoes",
)  # fmt: skip

NAMES = (
    "Anna", "Tom", "Lena", "David", "Michael", "James", "John", "Mary", "Paul", "Sarah", "Emily", "Daniel", "Robert",
    "William", "George", "Charles", "Jack", "Adam", "Alex", "Luke", "Alice", "Bob", "Frank", "Maria", "Nick", "Simon",
    "Tim", "Victor", "Andrew", "Ben", "Chris", "Dan", "Elizabeth", "Fred", "Jeff", "Jim", "Joseph", "Kim", "Martin",
    "Matt", "Max", "Neil", "Scott", "Stephen", "Maya", "Ali", "Leah", "Lily", "Edward", "Ray", "Carl", "Anne", "Marie",
    "Samuel", "Jacob", "Arjun",
)  # fmt: skip
UNSEEN_NAMES = (
    "Peter", "Thomas", "Henry", "Jane", "Sam", "Greg", "Matthew", "Richard", "Zoe", "Arthur", "Alexander", "Lee",
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

NUMBER_WORDS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven",
    12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen",
    19: "nineteen", 20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty",
    90: "ninety",
}  # fmt: skip

FRAMES = (
    "Please send {quantity} {item} to {name} on {day}.",
    "We need {quantity} {item} for {name} by {day}.",
    "Could you ship {quantity} {item} to {name} for {day}?",
    "On {day} our colleague {name} runs out, so order {quantity} {item}.",
    "{name} wants {quantity} {item} on {day}.",
    "Can {quantity} {item} be with {name} before {day}?",
    "I'd like to order {quantity} {item}, delivery to {name} on {day}.",
    "By {day}, get {quantity} {item} over to {name}.",
    "My neighbour {name} is asking for {quantity} {item} for {day}.",
    "Book a {day} delivery of {quantity} {item} to {name}.",
    "For {name}: {quantity} {item}, due {day}.",
    "{quantity} {item} for {name}, {day} please.",
    "Next {day} our friend {name} should receive {quantity} {item}.",
    "Put {quantity} {item} on the {day} truck for {name}.",
    "Our customer {name} bought {quantity} {item} and expects them on {day}.",
    "Is it possible to have {quantity} {item} delivered to {name} this {day}?",
    "Deliver to {name} on {day}: {quantity} {item}.",
    "{day} works for {name}, who is short of {quantity} {item}.",
    "Add {quantity} {item} to the order of {name}, arriving {day}.",
    "We promised {name} some {item} for {day}, {quantity} in total.",
    "{item} for {name}, {quantity} of them, on {day}.",
    "It's about {item}: {name} needs {quantity} by {day}.",
    "Send {item} to {name}, {quantity} of them, no later than {day}.",
    "How soon can {name} get {item}? We need {quantity} on {day}.",
    "{name} called and wants {item}, {quantity} this time, by {day}.",
    "Make sure that {quantity} {item} reach {name} on {day}.",
    "There is a party at the house of {name} on {day} and it takes {quantity} {item}.",
    "Reserve {quantity} {item}, pick-up by {name}, {day} morning.",
    "Before {day} comes, {name} must have {quantity} {item}.",
    "My name is {name}. Bring {quantity} {item} on {day}.",
    "If you can, drop {quantity} {item} at the shop of {name} on {day}.",
    "Schedule {item} for {day}, {name}, quantity {quantity}.",
)
UNSEEN_FRAMES = (
    "Would you get {quantity} {item} to {name} this {day}?",
    "The manager, {name}, has to receive {quantity} {item} on {day}.",
    "{day} delivery for {name}, {quantity} {item}.",
    "Last week {name} ordered {quantity} {item}, to arrive by {day}.",
    "Please arrange {item} for our partner {name}, {quantity} of them, by {day}.",
    "I am {name}, I open a cafe on {day} and I need {quantity} {item}.",
    "At the school {name} will be waiting for {quantity} {item} on {day}.",
    "New order: {quantity} {item}, ship to {name}, {day}.",
)

GREETINGS = ("", "", "", "", "Hi, ", "Hello! ", "Good morning. ", "Dear team, ")
THANKS = ("", "", "", "", "", " Thanks!", " Thank you.", " That is all.")

Combination = tuple[str, int, str, str]  # item, quantity, name, day: the four fields of an answer
Row = dict[str, list[dict[str, str]]]
T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of `options`, uniformly. Only `Random.random()` is promised to give the same numbers on every Python."""
    return options[int(rng.random() * len(options))]


def pick_quantity(rng: random.Random) -> tuple[int, str]:
    """A quantity as the answer gives it and as the request says it: half of them digits, half words."""
    if rng.random() < 0.5:
        quantity = 2 + int(rng.random() * 98)
        return quantity, str(quantity)
    quantity, words = pick(rng, tuple(NUMBER_WORDS.items()))
    if quantity == 12 and rng.random() < 0.5:
        words = "a dozen"
    return quantity, words


def capitalize_first(text: str) -> str:
    """`text` with an upper-case first letter and the rest as it is (`str.capitalize` lowers the rest)."""
    return text[:1].upper() + text[1:]


def make_request(
    rng: random.Random, frames: Sequence[str], items: Sequence[str], names: Sequence[str]
) -> tuple[Combination, str]:
    """One request drawn from the given choices: the four fields of its answer, and the sentence that a user writes."""
    item, name, day = pick(rng, items), pick(rng, names), pick(rng, DAYS)
    quantity, quantity_text = pick_quantity(rng)
    sentence = pick(rng, frames).format(item=item, quantity=quantity_text, name=name, day=day)
    text = pick(rng, GREETINGS) + capitalize_first(sentence) + pick(rng, THANKS)
    return (item, quantity, name, day[:3].lower()), text


def make_row(combination: Combination, text: str) -> Row:
    """The conversation in which `text` is answered with the JSON of `combination`."""
    answer = json.dumps(dict(zip(("item", "quantity", "name", "day"), combination, strict=True)))
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer},
        ]
    }


def eval_requests(rng: random.Random) -> Iterator[tuple[Combination, str]]:
    """The held-out requests: a row's number says, bit by bit, what of it training never shows."""
    for number in range(EVAL_ROWS):
        yield make_request(
            rng,
            UNSEEN_FRAMES if number & 1 else FRAMES,
            UNSEEN_ITEMS if number & 2 else ITEMS,
            UNSEEN_NAMES if number & 4 else NAMES,
        )


def train_requests(rng: random.Random, held_out: set[Combination]) -> Iterator[tuple[Combination, str]]:
    """The training requests: no combination twice, and none that is held out."""
    taken = set(held_out)
    while len(taken) < len(held_out) + TRAIN_ROWS:
        combination, text = make_request(rng, FRAMES, ITEMS, NAMES)
        if combination not in taken:
            taken.add(combination)
            yield combination, text


def write_rows(path: Path, requests: Sequence[tuple[Combination, str]]) -> None:
    """Writes one conversation a line, with the same bytes on every system."""
    lines = [json.dumps(make_row(combination, text)) + "\n" for combination, text in requests]
    path.write_bytes("".join(lines).encode("utf-8"))


def main() -> None:
    """Rewrites eval.jsonl and train.jsonl beside this script."""
    folder = Path(__file__).resolve().parent
    rng = random.Random(SEED)
    held_out = list(eval_requests(rng))
    write_rows(folder / "eval.jsonl", held_out)
    write_rows(folder / "train.jsonl", list(train_requests(rng, {combination for combination, _ in held_out})))


if __name__ == "__main__":
    main()
