"""Small GPTs: our default and our search against nanoGPT's recipe for a CPU, on any text.

    python -m tests.benchmarks.gpt --text FILE --json gpt.json
    python -m tests.benchmarks.gpt --text FILE --parts steps,stacks

The parts: `race` trains nanoGPT's recipe (`nanogpt.py`) and then our default configuration at
shares of its seconds, all of them training alone, without evaluations; `study` tunes for five
times its seconds and trains the best trial's configuration and the default one anew for all of
them; `steps` times a cohort of one against the same network as plain torch.nn code with torch's
fused AdamW; `stacks` times four members in one cohort against one by one; `mup` looks for the
best rate at width 64 and 256 under both parametrizations. Losses are nats per token of the whole
validation part, in one pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import math
from pathlib import Path
import statistics
import sys
import time
from typing import Any

import optuna
import torch
from torch.nn import functional

from optuna_nnhp import optimize
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.networks.transformer import count_parameters
from optuna_nnhp.templates.gpt import GPTTemplate
from optuna_nnhp.training.cohort import Member
from tests.benchmarks.common import gemm_peak
from tests.benchmarks.common import paired
from tests.benchmarks.common import take_turns
from tests.benchmarks.common import write_json
from tests.benchmarks.nanogpt import Baseline
from tests.benchmarks.nanogpt import train_nanogpt

PARTS = ("race", "study", "steps", "stacks", "mup")
SHARES = (
    1 / 30,
    1 / 25,
    1 / 20,
    1 / 16,
    1 / 12,
)  # of nanoGPT's seconds, until its loss is reached
STUDY = 5  # times nanoGPT's seconds
REPEATS = 7
SHAPES = {"64 x 4, context 64, batch 12": 64, "128 x 4, context 64, batch 12": 128}  # by width
RATES = tuple(2.0**e * 1e-3 for e in range(0, 6))
MUP_STEPS, MUP_SEEDS = 300, 3

Figures = dict[str, Any]


def problem_of(text: Path, seconds: float, seed: int = 0, **fixed: Any) -> GPTTemplate:
    """The template, with nothing tuned: its default configuration for a trial of so long."""
    return GPTTemplate(text, fixed={"seconds": seconds, **fixed}, seed=seed)


def train(problem: GPTTemplate, params: dict[str, Any], number: int = 0) -> Figures:
    """Train one trial to its end; seconds of training and the loss in nats per token."""
    cohort = problem.cohort([problem.member(number, params)])
    judged, score = 0.0, cohort._score

    def timed(places: list[int]) -> Any:
        nonlocal judged
        start = time.perf_counter()
        scores = score(places)
        judged += time.perf_counter() - start
        return scores

    cohort._score = timed  # type: ignore[method-assign]
    start = time.perf_counter()
    while True:
        scores = cohort.train_round()
        assert scores is not None
        if scores.ended[0]:
            break
    seconds = time.perf_counter() - start - judged
    loss, steps = scores.validation_loss[0], cohort.iterations[0]
    return {"seconds": seconds, "loss": loss, "bits_per_byte": scores.value[0], "steps": steps}


def nanogpt(text: Path) -> Baseline:
    """The baseline on the same characters and split."""
    tokens = GPTTemplate(text, fixed={"tokens": "char"}).text.tokens("char")
    return train_nanogpt(tokens.train, tokens.valid, tokens.tokenizer.size)


def race(text: Path, base: Baseline) -> Figures:
    """Our default at shares of the baseline's seconds, the last of them all."""
    rows: list[Figures] = []
    print(f"nanoGPT's recipe: {base.seconds:.1f} s, loss {base.loss:.4f}")
    for share in (*SHARES, 1.0):
        problem = problem_of(text, share * base.seconds)
        row = {"share": share, **train(problem, problem.defaults())}
        row["ratio"] = base.seconds / row["seconds"]
        rows.append(row)
        print(
            f"ours, 1/{1 / share:<4.0f} budget: {row['seconds']:7.1f} s (1/{row['ratio']:.1f}), "
            f"loss {row['loss']:.4f}"
        )
    first = next((r for r in rows if r["loss"] <= base.loss), None)
    if first is not None:
        print(f"nanoGPT's loss is reached in 1/{first['ratio']:.1f} of its seconds")
    return {"rows": rows, "reached": first and first["ratio"]}


def tuned(text: Path, base: Baseline) -> Figures:
    """A study, its best configuration and the default one trained anew for nanoGPT's seconds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result = optimize("gpt", text, timeout=STUDY * base.seconds, storage=None)
    found, trials = result.best_params, result.study.get_trials(deepcopy=False)
    problem = problem_of(text, base.seconds)
    known = {n: v for n, v in found.items() if n in problem.space}
    default = train(problem, problem.defaults())
    best = train(problem, known, number=result.best_trial.number)
    states = [t.state.name for t in trials]
    print(
        f"study of {STUDY * base.seconds:.0f} s: {len(trials)} trials, "
        f"{states.count('COMPLETE')} complete, best {result.best_value:.4f} bits per byte "
        f"(default {trials[0].value or math.nan:.4f}); trained for {base.seconds:.0f} s: "
        f"default {default['loss']:.4f}, best {best['loss']:.4f} "
        f"({best['loss'] - default['loss']:+.4f})"
    )
    return {"default": default, "best": best, "params": found, "states": states}


def steps(text: Path) -> Figures:
    """A cohort of one against plain code; and the share of the machine's products."""
    figures: Figures = {}
    for name, width in SHAPES.items():
        settings = {"optimizer": "adamw", "width": width, "context": 64, "layers": 4}
        problem = problem_of(text, 1.0, **settings, batch_tokens=768, head_size=width // 4)
        member = problem.member(0, problem.defaults())
        sides = {
            "ours": cohort_steps(problem, [member]),
            "plain": plain_steps(problem, member),
            "muon": cohort_steps(problem, [_with(problem, member, optimizer="muon")]),
            "gemm": gemm_peak(),
        }
        times = take_turns(sides, REPEATS)
        ratio = paired(times["ours"], times["plain"])
        flops = step_flops(problem, member)
        share = statistics.median(
            flops / t / peak for t, peak in zip(times["ours"], times["gemm"], strict=True)
        )
        ms = {n: 1e3 * statistics.median(times[n]) for n in ("ours", "plain", "muon")}
        figures[name] = {"ms": ms, "ratio": ratio, "share": share}
        print(
            f"{name}: ours {ms['ours']:.2f} ms, plain {ms['plain']:.2f} ms (ratio {ratio:.2f}), "
            f"with muon {ms['muon']:.2f} ms; {share:.0%} of the GEMM peak"
        )
    return figures


def stacks(text: Path) -> Figures:
    """Four members of width 64 in one cohort against one by one."""
    problem = problem_of(text, 1.0, width=64, context=64, layers=4, batch_tokens=768)
    members = [problem.member(i, problem.defaults()) for i in range(4)]
    alone = [cohort_steps(problem, [member]) for member in members]
    together = cohort_steps(problem, members)
    times = take_turns({"alone": lambda: sum(run() for run in alone), "one": together}, REPEATS)
    ratio = paired(times["alone"], times["one"])
    print(f"four members in one cohort: {ratio:.2f} times the model-steps per second")
    return {"ratio": ratio}


def mup(text: Path) -> Figures:
    """Losses by rate at width 64 and 256, and the best rates, under both parametrizations."""
    figures: Figures = {}
    for kind in ("standard", "mup"):
        best = {}
        for width in (64, 256):
            losses = {rate: _mean_loss(text, kind, width, rate) for rate in RATES}
            best[width] = min(losses, key=lambda rate: losses[rate])
            figures[f"{kind} {width}"] = {f"{rate:.3g}": loss for rate, loss in losses.items()}
            row = ", ".join(f"{rate:.3g}: {loss:.3f}" for rate, loss in losses.items())
            print(f"{kind}, width {width}: best rate {best[width]:.3g} ({row})")
        figures[f"{kind} factor"] = best[64] / best[256]
        print(f"{kind}: the best rate at width 64 is {best[64] / best[256]:g} times that at 256")
    return figures


def _mean_loss(text: Path, kind: str, width: int, rate: float) -> float:
    losses = []
    for seed in range(MUP_SEEDS):
        settings = {"layers": 2, "context": 64, "batch_tokens": 768, "optimizer": "adamw"}
        problem = GPTTemplate(
            text,
            fixed={
                **settings,
                "width": width,
                "iterations": MUP_STEPS,
                "parametrization": kind,
                "learning_rate": rate,
            },
            seed=seed,
        )
        losses.append(train(problem, problem.defaults())["loss"])
    return statistics.mean(losses)


def _with(problem: GPTTemplate, member: Member, **changes: Any) -> Member:
    return Member(member.number, member.seed, {**member.params, **changes})


def cohort_steps(
    problem: GPTTemplate, members: list[Member], count: int = 10
) -> Callable[[], float]:
    """Seconds of a step of all members, by the training loop itself."""
    cohort = problem._cohort(members, iterations=9000)

    def run() -> float:
        left = iter(range(count))
        start = time.perf_counter()
        cohort.train_round(lambda: next(left, None) is None)
        seconds = time.perf_counter() - start
        assert cohort.rounds_done[0] == 0 and cohort.iterations[0] % count == 0
        return seconds / count

    return run


def plain_steps(problem: GPTTemplate, member: Member, count: int = 10) -> Callable[[], float]:
    """The same network and steps as one writes them: a module, autograd, torch's fused AdamW."""
    cohort = problem._cohort([member], iterations=10**7)
    network, data = cohort.network.member(0).train(), cohort.task.arrays
    p = member.params
    betas = float(p["momentum"] or 0), float(p["beta2"] or 0)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        float(p["learning_rate"] or 0),
        betas,
        weight_decay=float(p["weight_decay"] or 0),
        fused=True,
    )

    def run() -> float:
        rows = cohort.batches.rows([0])
        some = [next(rows) for _ in range(count)]
        start = time.perf_counter()
        for place in some:
            optimizer.zero_grad()
            logits = network(data.train_x[place]).flatten(0, 1)
            functional.cross_entropy(logits, data.train_y[place].flatten()).backward()
            optimizer.step()
        return (time.perf_counter() - start) / count

    return run


def step_flops(problem: GPTTemplate, member: Member) -> float:
    """Operations of a step's products: six for each matrix weight and token, and attention's."""
    a = Architecture.from_params(member.params, problem._tokens(member).tokenizer.size)
    tokens = problem._sequences(member) * a.context
    weights = count_parameters(a) - a.vocabulary * a.width  # the embedding is no product
    return float(tokens * (6 * weights + 12 * a.layers * a.width * a.context / 2))


def arguments() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the text's file")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print their figures."""
    options = arguments().parse_args(argv)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        arguments().error(f"--parts must be of {', '.join(PARTS)}, but got {unknown}.")
    record: Figures = {}
    if "race" in parts or "study" in parts:
        base = nanogpt(options.text)
        record["nanogpt"] = vars(base)
        if "race" in parts:
            record["race"] = race(options.text, base)
        if "study" in parts:
            record["study"] = tuned(options.text, base)
    for name, part in (("steps", steps), ("stacks", stacks), ("mup", mup)):
        if name in parts:
            record[name] = part(options.text)
    write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
