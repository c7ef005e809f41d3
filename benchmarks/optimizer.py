"""``python -m benchmarks.optimizer``: what the penalty adds to an optimizer's step, and to a whole training step.

All steppers of a rule share the same GPT-2 weights, gradients and moments, and take turns; each time is a median over
the rounds, each ratio the median of the rounds' ratios, so that a machine whose speed drifts does not tell on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import STRENGTH, TEMPERATURE
from benchmarks.shapes import weights
from r2_kernels import RangeRegularizer, optim, reference

Step = Callable[[], Any]
TOKENS = 128
# (what is asked, numerator, denominator)
QUESTIONS = {
    "AdamW": [
        ("soft-min-max inside / the same step without", "r2 AdamW, soft_min_max", "r2 AdamW"),
        ("soft-min-max inside / torch's fused step without", "r2 AdamW, soft_min_max", "torch AdamW(fused=True)"),
        ("margin inside / torch's fused step without", "r2 AdamW, margin", "torch AdamW(fused=True)"),
        ("L∞ inside / torch's fused step without", "r2 AdamW, linf", "torch AdamW(fused=True)"),
        ("add_gradients_ before torch's / torch's without", "add_gradients_, torch AdamW", "torch AdamW(fused=True)"),
        ("eager soft-min-max before torch's / without", "eager penalty, torch AdamW", "torch AdamW(fused=True)"),
    ],
    "SGD": [
        ("soft-min-max inside / the same step without", "r2 SGD, soft_min_max", "r2 SGD"),
        ("soft-min-max inside / torch's fused step without", "r2 SGD, soft_min_max", "torch SGD(fused=True)"),
        ("margin inside / torch's fused step without", "r2 SGD, margin", "torch SGD(fused=True)"),
        ("L∞ inside / torch's fused step without", "r2 SGD, linf", "torch SGD(fused=True)"),
        ("add_gradients_ before torch's / torch's without", "add_gradients_, torch SGD", "torch SGD(fused=True)"),
        ("eager soft-min-max before torch's / without", "eager penalty, torch SGD", "torch SGD(fused=True)"),
    ],
    "training step": [
        ("soft-min-max inside / the same step without", "r2 AdamW, soft_min_max", "r2 AdamW"),
        ("soft-min-max inside / torch's fused AdamW without", "r2 AdamW, soft_min_max", "torch AdamW(fused=True)"),
        ("add_gradients_ before torch's / without", "add_gradients_, torch AdamW", "torch AdamW(fused=True)"),
        ("eager soft-min-max before torch's / without", "eager penalty, torch AdamW", "torch AdamW(fused=True)"),
    ],
}
RULES: dict[str, dict[str, Any]] = {"AdamW": {"lr": 1e-4}, "SGD": {"lr": 1e-4, "momentum": 0.9}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each stepper")
    parser.add_argument("--only", action="append", choices=list(QUESTIONS), help="this part alone (repeatable)")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"), help="folder for the JSON file")
    arguments = parser.parse_args()
    results = {}
    for part in arguments.only or QUESTIONS:
        steps = training_steps() if part == "training step" else optimizer_steps(part)
        times = take_turns(steps, arguments.rounds)
        results[part] = times
        print(
            f"\n{part}, GPT-2 shapes, float32, {torch.get_num_threads()} threads\n{as_table(part, times)}", flush=True
        )
        del steps
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "optimizer.json"
    path.write_text(json.dumps({"torch": torch.__version__, "seconds": results}, indent=1))
    print(f"\nTimes in {path}")
    return 0


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; an eager penalty, which takes a hundred times longer, has three."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name, step in steps.items():
            if name.startswith("eager") and turn >= 3:
                continue
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[numerator], times[denominator], strict=False))


def as_table(part: str, times: dict[str, list[float]]) -> str:
    """Markdown: the times, and the ratios."""
    lines = ["| step | ms |", "|---|---|"]
    lines += [f"| {name} | {statistics.median(seconds) * 1e3:.1f} |" for name, seconds in times.items()]
    lines += ["", "| work | ratio |", "|---|---|"]
    lines += [f"| {what} | {ratio(times, above, below):.3f} |" for what, above, below in QUESTIONS[part]]
    return "\n".join(lines)


def optimizer_steps(rule: str, shapes: str = "GPT-2") -> dict[str, Step]:
    """Steps of one update rule over the same weights, gradients and moments."""
    parameters = [nn.Parameter(weight) for weight in weights(shapes)]
    for weight in parameters:
        weight.grad = torch.randn_like(weight).mul_(1e-3)
    settings = RULES[rule]
    fused, plain = getattr(optim, rule), getattr(torch.optim, rule)(parameters, fused=True, **settings)
    plain.step()
    steps: dict[str, Step] = {f"torch {rule}(fused=True)": plain.step, f"r2 {rule}": _sharing(plain, fused, settings)}
    for penalty in ("linf", "margin", "soft_min_max"):
        steps[f"r2 {rule}, {penalty}"] = _sharing(plain, fused, settings, _regularizer(parameters, penalty))
    regularizer = _regularizer(parameters, "soft_min_max")
    steps[f"add_gradients_, torch {rule}"] = lambda: (regularizer.add_gradients_(), plain.step())
    temperature = torch.full((len(parameters),), TEMPERATURE, requires_grad=True)
    steps[f"eager penalty, torch {rule}"] = lambda: (_add_eagerly(parameters, temperature), plain.step())
    return steps


def _regularizer(parameters: list[nn.Parameter], penalty: str) -> RangeRegularizer:
    named = [(str(index), weight) for index, weight in enumerate(parameters)]
    start = {"temperature": TEMPERATURE} if penalty == "soft_min_max" else {}
    return RangeRegularizer(named, penalty, strength=STRENGTH, include="*", **start)


def _sharing(
    plain: torch.optim.Optimizer,
    fused: type[torch.optim.Optimizer],
    settings: dict[str, Any],
    regularizer: RangeRegularizer | None = None,
) -> Step:
    """The step of an optimizer on the moments of another one, so that both read and write the same memory."""
    optimizer = fused(plain.param_groups[0]["params"], regularizer=regularizer, **settings)
    for parameter, state in plain.state.items():
        optimizer.state[parameter] = state

    def step() -> None:
        if regularizer is not None:
            for carried in regularizer.carried_statistics:  # the other steppers have changed the weights in between,
                carried.remember(carried.weights, regularizer.own_parameter())  # by too little to matter for the time
        optimizer.step()

    return step


def _add_eagerly(parameters: list[nn.Parameter], temperature: Tensor) -> None:
    (STRENGTH * reference.soft_min_max(parameters, temperature).sum()).backward()


class Gpt2(nn.Module):
    """A decoder with the shapes of the smallest GPT-2, the output tied to the embedding."""

    def __init__(self, vocabulary: int = 50257, positions: int = 1024, width: int = 768, layers: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(count)
        hidden = self.tokens(tokens) + self.positions.weight[:count]
        return self.layers(hidden, mask=mask, is_causal=True) @ self.tokens.weight.T


def training_steps() -> dict[str, Step]:
    """Forward, backward and step on one batch of one sequence, without and with the penalty, on the same moments."""
    torch.manual_seed(0)
    model = Gpt2()
    tokens = torch.randint(50257, (1, TOKENS + 1))
    regularizer = RangeRegularizer(model, "soft_min_max", strength=STRENGTH, temperature=TEMPERATURE)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    without = optim.AdamW(model.parameters(), lr=1e-4)
    within = optim.AdamW(model.parameters(), lr=1e-4, regularizer=regularizer)
    outside = RangeRegularizer(model, "soft_min_max", strength=STRENGTH, temperature=TEMPERATURE)
    temperature = torch.full((len(outside.names),), TEMPERATURE, requires_grad=True)

    def step(optimizer: torch.optim.Optimizer, add_penalty: Step = lambda: None) -> None:
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
        add_penalty()
        for carried in regularizer.carried_statistics:
            carried.remember(carried.weights, regularizer.own_parameter())
        optimizer.step()
        optimizer.zero_grad()

    step(plain)
    for parameter in model.parameters():
        without.state[parameter] = within.state[parameter] = plain.state[parameter]
    return {
        "torch AdamW(fused=True)": lambda: step(plain),
        "r2 AdamW": lambda: step(without),
        "r2 AdamW, soft_min_max": lambda: step(within),
        "add_gradients_, torch AdamW": lambda: step(plain, outside.add_gradients_),
        "eager penalty, torch AdamW": lambda: step(plain, lambda: _add_eagerly(outside.weights(), temperature)),
    }


if __name__ == "__main__":
    sys.exit(main())
