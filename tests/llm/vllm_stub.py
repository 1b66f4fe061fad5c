"""A stand-in for vLLM over a tiny transformers model: its server's protocol, and its module in process.

Fields, defaults and their meaning are those of vLLM 0.32.0 (entrypoints/openai/completion/protocol.py and
serving.py, sampling_params.py, entrypoints/llm.py, v1/sample/sampler.py, v1/engine/parallel_sampling.py),
restated as facts; tests/llm/test_vllm.py compares them with the real ones where vLLM is installed. Sampling
is written out here in NumPy from vLLM's order (penalties, temperature, min-p, top-k, top-p), and shares no
line with alignpro's.
"""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

COMPLETION_REQUEST = [
    "model",
    "prompt",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "allowed_token_ids",
    "prompt_logprobs",
    "logprob_token_ids",
    "bad_words",
    "prompt_embeds",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "return_mm_kwargs",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "thinking_token_budget",
    "stream_interval",
]
CHOICE = [
    "index",
    "text",
    "logprobs",
    "finish_reason",
    "stop_reason",
    "token_ids",
    "prompt_logprobs",
    "prompt_token_ids",
    "routed_experts",
]
MODEL_CARD = ["id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"]
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
}
"""Sampling that a request leaves out and no generation_config sets."""
SHIPPED = {"repetition_penalty": 1.8, "presence_penalty": 1.0, "frequency_penalty": 1.0}
SHIPPED |= {"temperature": 0.4, "top_k": 3, "top_p": 0.7, "min_p": 0.5}
"""A generation_config that leaks wherever a request is silent."""


class Invalid(ValueError):
    """What vLLM answers with status 400."""


def check(params: Any, max_logprobs: int) -> None:
    """SamplingParams._verify_args, and the engine's limit on log-probabilities."""
    for name, good in {
        "n": params.n >= 1,
        "temperature": 0 <= params.temperature <= 2,
        "top_p": 0 < params.top_p <= 1,
        "top_k": isinstance(params.top_k, int) and params.top_k >= -1,
        "min_p": 0 <= params.min_p <= 1,
        "repetition_penalty": params.repetition_penalty > 0,
        "presence_penalty": -2 <= params.presence_penalty <= 2,
        "frequency_penalty": -2 <= params.frequency_penalty <= 2,
        "max_tokens": params.max_tokens >= 1,
        "stop_token_ids": all(isinstance(i, int) for i in params.stop_token_ids or []),
    }.items():
        if not good:
            raise Invalid(f"{name} must be another, got {getattr(params, name)}.")
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and not 0 <= asked <= max_logprobs:
            what = name.replace("_", " ")
            raise Invalid(f"Requested {what} of {asked}, which is greater than max allowed: {max_logprobs}")


@dataclass
class SamplingParams:
    """The fields of vllm.SamplingParams that exist here, by their names and defaults."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | None = None
    cumulative_logprob: float | None = None


@dataclass
class Engine:
    """A model, run one token after another without any cache."""

    model: Any
    tokenizer: Any
    eos: int
    """The tokenizer's end; a request may ignore it."""
    max_model_len: int = 512
    max_logprobs: int = 20
    processed: bool = False
    """--logprobs-mode processed_logprobs, which changes those of samples and not those of prompts."""
    seen: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    """For requests without a seed."""

    def logits(self, ids: list[int]) -> np.ndarray:
        key = tuple(ids)
        if key not in self.seen:
            with torch.inference_mode():
                self.seen[key] = self.model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()
        return self.seen[key]

    def complete(self, ids: list[int], params: Any) -> Any:
        check(params, self.max_logprobs)
        if len(ids) >= self.max_model_len:
            raise Invalid(f"This model's maximum context length is {self.max_model_len} tokens.")
        told = None
        if params.prompt_logprobs is not None:
            raw = _log_softmax(self.logits(ids))
            told = [None, *(_tops(raw[i - 1], ids[i], params.prompt_logprobs) for i in range(1, len(ids)))]
        outputs = [self._sample(ids, params, k) for k in range(params.n)]
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=told, outputs=outputs, finished=True)

    def _sample(self, prompt: list[int], params: Any, k: int) -> CompletionOutput:
        rng = self.rng if params.seed is None else np.random.default_rng(params.seed + k)
        most = min(params.max_tokens, self.max_model_len - len(prompt))
        new: list[int] = []
        tops: list[dict[int, Logprob]] = []
        stops = set(params.stop_token_ids or []) | (set() if params.ignore_eos else {self.eos})
        finish = "length"
        while len(new) < most:
            logits = self.logits([*prompt, *new])[-1]
            kept = processed(logits, prompt, new, params)
            token = (
                int(np.argmax(kept))
                if params.temperature == 0
                else int(rng.choice(len(kept), p=_softmax(kept)))
            )
            if params.logprobs is not None:
                scores = kept if self.processed else logits
                tops.append(_tops(_log_softmax(scores), token, params.logprobs))
            new.append(token)
            if token in stops:
                finish = "stop"
                break
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        reason = new[-1] if finish == "stop" and new[-1] != self.eos else None
        return CompletionOutput(k, text, new, tops if params.logprobs is not None else None, finish, reason)


def processed(logits: np.ndarray, prompt: list[int], new: list[int], params: Any) -> np.ndarray:
    """What vLLM samples from: penalties, temperature, min-p, top-k and then top-p."""
    out = logits.copy()
    met = sorted({*prompt, *new})
    out[met] = np.where(
        out[met] > 0, out[met] / params.repetition_penalty, out[met] * params.repetition_penalty
    )
    counts = np.bincount(new, minlength=len(out)) if new else np.zeros(len(out))
    out -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    if params.temperature == 0:
        return out
    out /= params.temperature
    p = _softmax(out)
    out[p < params.min_p * p.max()] = -np.inf
    if params.top_k > 0:
        out[out < np.sort(out)[-min(params.top_k, len(out))]] = -np.inf
    order = np.argsort(out)
    out[order[np.cumsum(_softmax(out)[order]) <= 1 - params.top_p]] = -np.inf
    return out


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(_log_softmax(x))


def _tops(row: np.ndarray, token: int, n: int) -> dict[int, Logprob]:
    order = np.argsort(-row, kind="stable")
    found = {token: Logprob(float(row[token]), int((row >= row[token]).sum()))}
    return found | {int(i): Logprob(float(row[i]), r) for r, i in enumerate(order[:n], 1)}


class VLLMServer:
    """`vllm serve` on loopback. `requests` holds (path, body); `shipped` is the model's generation_config.

    `fault(number of the request, body)` may give (status, JSON) instead.
    """

    def __init__(self, engine: Engine, name: str = "m", shipped: dict[str, Any] | None = None) -> None:
        self.engine, self.name, self.shipped = engine, name, SHIPPED if shipped is None else shipped
        self.owner = "vllm"
        self.fault: Any = lambda n, body: None
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                card = {"id": outer.name, "object": "model", "owned_by": outer.owner, "root": "/models/m"}
                card["max_model_len"] = outer.engine.max_model_len
                outer.send(self, 200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body))
                    outer.send(self, *outer.answer(number, self.path, body))

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> "VLLMServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def send(self, handler: BaseHTTPRequestHandler, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def answer(self, number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if (fault := self.fault(number, body)) is not None:
            return fault
        try:
            return 200, self.completion(body) if path == "/v1/completions" else self.chat(body)
        except Invalid as error:
            kind = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
            return 400, {"error": kind}

    def params(self, body: dict[str, Any]) -> SamplingParams:
        chosen = {name: body.get(name) for name in NEUTRAL}
        chosen = {n: self.shipped.get(n, NEUTRAL[n]) if v is None else v for n, v in chosen.items()}
        more = ["n", "seed", "stop_token_ids", "ignore_eos", "max_tokens", "logprobs", "prompt_logprobs"]
        return SamplingParams(**chosen, **{n: body[n] for n in more if n in body})

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] != self.name:
            raise Invalid(f"The model `{body['model']}` does not exist.")
        params, ids = self.params(body), body["prompt"]
        found = self.engine.complete(ids, params)
        choices = []
        for output in found.outputs:
            logprobs = None
            if params.logprobs is not None:
                own = [step[i] for step, i in zip(output.logprobs, output.token_ids, strict=True)]
                tokens = [self.engine.tokenizer.decode([i]) for i in output.token_ids]
                logprobs = {
                    "text_offset": [0] * len(own),
                    "tokens": tokens,
                    "top_logprobs": [None] * len(own),
                }
                logprobs["token_logprobs"] = [max(each.logprob, -9999.0) for each in own]
            told = None
            if found.prompt_logprobs is not None:
                told = [e and {str(i): vars(v) for i, v in e.items()} for e in found.prompt_logprobs]
            with_ids = body.get("return_token_ids")
            choices.append(
                {
                    "index": output.index,
                    "text": output.text,
                    "logprobs": logprobs,
                    "finish_reason": output.finish_reason,
                    "stop_reason": output.stop_reason,
                    "token_ids": output.token_ids if with_ids else None,
                    "prompt_logprobs": told,
                    "prompt_token_ids": ids if with_ids else None,
                }
            )
        return {
            "object": "text_completion",
            "model": self.name,
            "choices": choices,
            "usage": _usage(ids, found),
        }

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.engine.tokenizer
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found = self.engine.complete(ids, self.params(body))
        output = found.outputs[0]
        message = {"role": "assistant", "content": output.text}
        choice = {"index": 0, "message": message, "finish_reason": output.finish_reason}
        return {"choices": [choice], "usage": _usage(ids, found)}


def _usage(ids: list[int], found: Any) -> dict[str, int]:
    said = sum(len(output.token_ids) for output in found.outputs)
    return {"prompt_tokens": len(ids), "completion_tokens": said, "total_tokens": len(ids) + said}


def module(brain: Engine) -> ModuleType:
    """A module `vllm` whose LLM is `brain`, whatever it is asked to load; `made` holds LLM's arguments."""
    found = ModuleType("vllm")

    class LLM:
        made: ClassVar[list[dict[str, Any]]] = []

        def __init__(
            self,
            model: str,
            *,
            tokenizer: str | None = None,
            tensor_parallel_size: int = 1,
            dtype: str = "auto",
            seed: int = 0,
            gpu_memory_utilization: float = 0.92,
            **kwargs: Any,
        ) -> None:
            LLM.made.append({"model": model, "dtype": dtype, "seed": seed, **kwargs})
            LLM.made[-1] |= {"tensor_parallel_size": tensor_parallel_size}
            LLM.made[-1] |= {"gpu_memory_utilization": gpu_memory_utilization}
            brain.max_logprobs = kwargs.get("max_logprobs", 20)
            brain.max_model_len = kwargs.get("max_model_len") or brain.max_model_len
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=brain.max_model_len))

        def generate(
            self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True, **_: Any
        ) -> list[Any]:
            each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
            asked = zip(prompts, each, strict=True)
            return [brain.complete(prompt["prompt_token_ids"], params) for prompt, params in asked]

    found.LLM, found.SamplingParams, found.__version__ = LLM, SamplingParams, "0.32.0"  # type: ignore[attr-defined]
    found.RequestOutput = SimpleNamespace  # type: ignore[attr-defined]
    return found
