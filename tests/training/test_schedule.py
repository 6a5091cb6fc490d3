"""Which rows a step learns from, and how they are divided into forwards."""

import random

import pytest

from qlora.training.schedule import Forwards, Schedule, plan_schedule

LENGTHS = random.Random(0).choices(range(20, 600), k=203)


def schedule(**changed) -> Schedule:
    return Schedule(**({"lengths": LENGTHS, "rows_per_step": 16, "forwards": 3, "processes": 2, "seed": 0} | changed))


@pytest.mark.parametrize("padded", [False, True])
def test_every_row_is_learned_from_once_in_an_epoch_and_a_step_has_its_rows(padded) -> None:
    steps = list(schedule(padded=padded).steps(0))
    assert sorted(row for step in steps for rows in step for row in rows) == list(range(203))
    assert [sum(map(len, step)) for step in steps] == [16] * 12 + [11]
    assert all(len(step) == 6 for step in steps)


def test_rows_of_a_step_do_not_depend_on_how_they_are_divided_and_change_with_epoch_and_seed() -> None:
    def rows(steps) -> list[list[int]]:
        return [sorted(row for rows in step for row in rows) for step in steps]

    expected = rows(schedule().steps(1))
    assert rows(schedule(forwards=1, processes=1).steps(1)) == expected
    assert rows(schedule(padded=True).steps(1)) == expected
    assert rows(schedule().steps(0)) != expected != rows(schedule(seed=1).steps(1))


def test_forwards_of_a_step_are_about_equally_long() -> None:
    for step in list(schedule().steps(0))[:-1]:
        tokens = [schedule().tokens(rows) for rows in step]
        assert max(tokens) - min(tokens) <= max(LENGTHS)
        assert max(tokens) < 1.3 * sum(tokens) / len(tokens)


def test_padding_is_counted_and_small_where_rows_stand_by_length() -> None:
    padded = schedule(padded=True)
    assert padded.tokens([0, 1]) == 2 * max(LENGTHS[:2])
    assert padded.tokens([]) == 0
    real = sum(LENGTHS)
    assert real < sum(padded.tokens(rows) for step in padded.steps(0) for rows in step) < 1.25 * real


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("processes, forwards", [(1, 1), (1, 3), (2, 3), (1, 16)])
def test_the_longest_forward_is_found_without_dividing_every_step(padded, multiple, processes, forwards) -> None:
    for lengths in (LENGTHS, LENGTHS[:15], [7] * 40, [1] * 99 + [500]):
        plan = schedule(lengths=lengths, padded=padded, multiple=multiple, processes=processes, forwards=forwards)
        every = [plan.tokens(rows) for epoch in range(3) for step in plan.steps(epoch) for rows in step]
        assert plan.longest(3) == max(every)
        assert plan.work(plan.steps_per_epoch)[-1] == (sum(lengths), sum(every[: len(every) // 3]))
        assert sum(len(Forwards(plan, process)) for process in range(processes)) == len(every) // 3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("most_tokens", [600, 1000, 3000, 10**6])
def test_no_forward_is_longer_than_asked_and_there_are_no_more_than_needed(most_tokens, padded) -> None:
    plan = plan_schedule(
        LENGTHS, rows_per_step=16, processes=1, seed=0, epochs=2, most_tokens=most_tokens, padded=padded
    )
    assert plan.longest(2) <= most_tokens
    if plan.forwards > 1:
        fewer = schedule(forwards=plan.forwards - 1, processes=1, padded=padded)
        assert fewer.longest(2) > most_tokens


def test_a_row_that_is_too_long_has_a_forward_of_its_own() -> None:
    plan = plan_schedule(LENGTHS, rows_per_step=16, processes=2, seed=0, epochs=1, most_tokens=10)
    assert plan.forwards == 8 and plan.longest(1) == max(LENGTHS)


def test_processes_share_the_forwards_of_a_step() -> None:
    plan = schedule()
    samplers = [Forwards(plan, process) for process in range(2)]
    for sampler in samplers:
        sampler.set_epoch(3)
    forwards = [list(sampler) for sampler in samplers]
    assert list(map(len, forwards)) == [len(sampler) for sampler in samplers] == [39, 39]
    for number, step in enumerate(plan.steps(3)):
        own = [each[3 * number : 3 * number + 3] for each in forwards]
        assert sorted(map(tuple, own[0] + own[1])) == sorted(map(tuple, step))


def test_the_last_step_of_few_rows_has_fewer_forwards() -> None:
    plan = Schedule([10] * 19, rows_per_step=8, forwards=4, processes=2, seed=0)
    assert [len(step) for step in plan.steps(0)] == [8, 8, 4]
    assert len(Forwards(plan, 0)) == 4 + 4 + 2
    assert [sorted(map(len, step)) for step in plan.steps(0)][-1] == [0, 1, 1, 1]
