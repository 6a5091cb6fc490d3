"""A real model behind an OpenAI-compatible API, which takes prompts in the forms that it is told to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora.models.loading import load_gptq


class ModelServer(ThreadingHTTPServer):
    """forms: of ids, text and chat. key: that it wants. names: of the models it says it has. delay: in seconds."""

    daemon_threads = True

    def __init__(self, directory: Path, forms=("ids",), key=None, names=("facts",), delay=0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        quantized = "quantization_config" in json.loads((directory / "config.json").read_text())
        load = load_gptq if quantized else AutoModelForCausalLM.from_pretrained
        self.model = load(directory, dtype=torch.bfloat16) if not quantized else load(directory, torch.bfloat16)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.forms, self.key, self.names, self.delay = forms, key, names, delay
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "ModelServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def generate(self, ids: list[int], most: int) -> list[int]:
        prompt = torch.tensor([ids])
        out = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False, pad_token_id=2
        )
        return out[0, len(ids) :].tolist()


class Handler(BaseHTTPRequestHandler):
    server: ModelServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": name} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.asked.append({"path": self.path, **body})
        time.sleep(server.delay)
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self._answer(401, {"error": {"message": "no such key"}})
        if self.path == "/v1/chat/completions" and "chat" in server.forms:
            ids = server.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        elif self.path == "/v1/completions" and isinstance(body["prompt"], list) and "ids" in server.forms:
            ids = body["prompt"]
        elif self.path == "/v1/completions" and isinstance(body["prompt"], str) and "text" in server.forms:
            ids = server.tokenizer(body["prompt"])["input_ids"]
        else:
            return self._answer(400, {"error": {"message": "not in this form"}})
        assert body["temperature"] == 0
        said = server.generate(ids, body["max_tokens"])
        text = server.tokenizer.decode(said, skip_special_tokens=True)
        if self.path.endswith("chat/completions"):
            return self._answer(200, {"choices": [{"message": {"content": text}}]})
        return self._answer(
            200, {"choices": [{"text": text, "token_ids": said if body.get("return_token_ids") else None}]}
        )

    def _answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
