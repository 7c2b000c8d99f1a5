from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from optuna_nnhp import rng
from optuna_nnhp.engine.gpt import load_library
from optuna_nnhp.engine.library import ENGINE_VARIABLE
from optuna_nnhp.hyperparameters.catalogue import effective_params
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.hyperparameters.loss import ClassificationLoss
from optuna_nnhp.hyperparameters.muon import learning_rate_factor
from optuna_nnhp.hyperparameters.muon import orthogonalize
from optuna_nnhp.networks.flat_parameters import FlatParameters
from optuna_nnhp.networks.gpt import StackedGPT
from optuna_nnhp.networks.transformer import Architecture
from optuna_nnhp.training.cohort import Arrays
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.language import ROUNDS_PER_BUDGET
from optuna_nnhp.training.language import Corpus
from optuna_nnhp.training.language import LanguageTask
from optuna_nnhp.training.language import TextWindows
from optuna_nnhp.training.language import TokenLoss
from optuna_nnhp.training.language import total_nats
from optuna_nnhp.training.param_groups import ParamGroupUpdate
from tests.tolerance import EXACT
from tests.tolerance import FLOAT64
from tests.tolerance import assert_close

CPU = torch.device("cpu")
SMALL = {"layers": 2, "heads": 2, "head_size": 8, "context": 8, "batch_tokens": 32}


def params(**changes: Any) -> dict[str, Any]:
    defaults = {name: h.default for name, h in specs("language").items()}
    return effective_params("language", {**defaults, **SMALL, **changes})


def task(iterations: int = 27, **changes: Any) -> LanguageTask:
    source = torch.Generator().manual_seed(0)
    train, valid = (torch.randint(11, (n,), generator=source) for n in (400, 90))
    a = Architecture.from_params(params(**changes), 11)

    def build(members: Any) -> StackedGPT:
        generators = [rng.generator(0, rng.INITIALIZATION, m.seed) for m in members]
        return StackedGPT(a, [m.params for m in members], generators)

    def loss(members: Any) -> TokenLoss:
        zeros = torch.zeros(len(members))
        return TokenLoss(ClassificationLoss(zeros, zeros))

    return LanguageTask(
        arrays=Arrays(train[:-1], train[1:], valid[:-1], valid[1:]),
        build=build,
        loss=loss,
        metric=None,
        maximize=False,
        seed=0,
        corpus=Corpus(train, valid, len(valid) - 1),
        context=a.context,
        sequences=4,
        iterations=iterations,
    )


def members(k: int, **changes: Any) -> list[Member]:
    rates = (0.003, 0.01, 0.03)
    return [
        Member(
            i,
            i,
            params(
                **{
                    "learning_rate": rates[i % 3],
                    "dropout": (0.0, 0.2)[i % 2],
                    "weight_decay": (0.0, 0.1)[i % 2],
                    "clip_norm": (math.inf, 0.5)[i % 2],
                    "embedding_rate": (1.0, 3.0)[i % 2],
                    "muon_learning_rate": (0.01, 0.03)[i % 2],
                }
                | changes
            ),
        )
        for i in range(k)
    ]


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(cohort: Cohort) -> dict[int, list[float]]:
    curves: dict[int, list[float]] = {m.number: [] for m in cohort.members}
    while True:
        scores = cohort.train_round()
        assert scores is not None
        for place, value in zip(scores.indices, scores.value, strict=True):
            curves[cohort.members[place].number].append(value)
        if any(scores.ended):
            return curves


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("parametrization", ["standard", "mup"])
def test_members_together_are_members_alone(
    optimizer: str, parametrization: str, float64: None
) -> None:
    settings = {"optimizer": optimizer, "parametrization": parametrization, "base_width": 8}
    chosen, some = task(**settings), members(3, **settings)
    together = trained(Cohort(some, chosen))
    for member in some:
        alone = trained(Cohort([member], chosen))
        assert_close(together[member.number], alone[member.number], FLOAT64)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_both_engines_train_alike(
    optimizer: str, dropout: float, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optimizer": optimizer, "dropout": dropout, "token_shift": True}
    learning_curves = []
    for is_compiled in (True, False):
        if not is_compiled:
            monkeypatch.setenv(ENGINE_VARIABLE, "torch")
        cohort = Cohort(members(3, **settings), task(iterations=25, **settings))
        assert (cohort.engine is not None) == (is_compiled and load_library() is not None)
        first = cohort.train_round()
        cohort.select([0, 2])
        second = cohort.train_round()
        assert first is not None and second is not None
        last = trained(cohort)
        learning_curves.append(
            [*first.train_loss, *first.value, *second.value, *last[0], *last[2]]
        )
    assert_close(learning_curves[0], learning_curves[1], FLOAT64)


def test_evaluations_at_a_ninth_a_third_and_the_end_of_the_budget() -> None:
    cohort = Cohort(members(1), task(iterations=27))
    seen = []
    while not seen or not seen[-1].ended[0]:
        scores = cohort.train_round()
        assert scores is not None
        seen.append(scores)
    assert [s.rounds[0] for s in seen] == [1, 3, ROUNDS_PER_BUDGET]
    assert [s.best_round[0] for s in seen] == [
        0,
        0,
        ROUNDS_PER_BUDGET,
    ]  # parts of the text are no values
    assert cohort.iterations == [27]


@pytest.mark.parametrize("iterations", [1, 5, 10, 28])
def test_any_number_of_steps_is_a_budget(iterations: int) -> None:
    cohort = Cohort(members(1), task(iterations=iterations))
    trained(cohort)
    assert cohort.iterations == [iterations]


@pytest.mark.parametrize("length", [2, 8, 9, 17, 30])
def test_every_token_but_the_first_is_predicted_once(length: int) -> None:
    tokens = torch.randint(5, (length,))
    seen: list[Tensor] = []

    def network(ids: Tensor) -> Tensor:
        seen.append(ids.flatten())
        return torch.zeros(2, ids.numel(), 5)

    nats = total_nats(network, tokens, context=8, members=2)
    assert_close(nats, torch.full((2,), (length - 1) * math.log(5)), FLOAT64)
    assert_close(torch.cat(seen), tokens[:-1], EXACT)


def test_nats_are_those_of_a_loop_over_tokens() -> None:
    gpt = task().build(members(1)).eval()
    tokens = torch.randint(11, (21,))
    expected = 0.0
    for i in range(1, 21):
        start = (i - 1) // 8 * 8
        logits = gpt(tokens[None, start:i])[0, -1].detach()
        expected += float(functional.cross_entropy(logits, tokens[i]))
    assert float(total_nats(gpt, tokens, 8, 1)) == pytest.approx(expected, rel=1e-5)


def test_windows_depend_on_seed_and_finished_rounds_only() -> None:
    def rows(done: list[int], seed: int = 0) -> list[Tensor]:
        return list(TextWindows(100, 8, 2, 18, seed, CPU).rows(done))

    assert_close(torch.stack(rows([3])), torch.stack(rows([3, 3])), EXACT)
    mixed = rows([3, 0])
    assert mixed[0].shape == (2, 2, 8)
    assert_close(mixed[0][0], rows([3])[0], EXACT)
    assert_close(mixed[0][1], rows([0])[0], EXACT)
    assert not torch.equal(rows([3])[0], rows([3], seed=1)[0])


def test_windows_reach_both_ends_of_the_text() -> None:
    windows = TextWindows(12, 8, 64, 9, 0, CPU)
    starts = torch.cat([rows[:, 0] for age in range(5) for rows in windows.rows([age])])
    assert set(starts.tolist()) == {0, 1, 2, 3}  # and the token after the last is the text's last


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 8), (2, 8, 32), (2, 32, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.4


def _one_step(optimizer: str, k: int = 2, **changes: Any) -> tuple[Any, ...]:
    """Weights before and after a step of random gradients, by parameter's name."""
    some = members(k, optimizer=optimizer, dropout=0.0, **changes)
    network = task().build(some)
    flat = FlatParameters(network)
    flat.allocate_grads()
    flat.grads.normal_(generator=torch.Generator().manual_seed(5))
    flat.steps += 1
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    grads = {
        name: flat.grads[:, start : start + p[0].numel()].view(p.shape).clone()
        for p, start in flat.offsets.items()
        for name, other in network.named_parameters()
        if other is p
    }
    update = ParamGroupUpdate(flat, network, some)
    update.step(torch.tensor([float(m.params["learning_rate"]) for m in some]))
    return some, before, dict(network.named_parameters()), grads


def _clipped(grads: dict[str, Tensor], i: int, norm: float) -> dict[str, Tensor]:
    total = math.sqrt(sum(float(g[i].double().square().sum()) for g in grads.values()))
    scale = min(1.0, norm / (total + 1e-6))
    return {n: g[i] * scale for n, g in grads.items()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_is_that_of_torch_optim(optimizer: str) -> None:
    some, before, after, grads = _one_step(optimizer)
    for i, member in enumerate(some):
        p, own = member.params, _clipped(grads, i, member.params["clip_norm"])
        for name, start in before.items():
            hidden = name.startswith("blocks.")
            weight = torch.nn.Parameter(start[i].clone())
            weight.grad = own[name]
            if hidden and optimizer == "muon":
                _check_muon(weight, after[name][i], p, pieces=3 if "qkv" in name else 1)
                continue
            rate = p["learning_rate"] * (1.0 if hidden else p["embedding_rate"])
            betas = (p["momentum"], p["beta2"])
            decay = p["weight_decay"]
            torch.optim.AdamW([weight], rate, betas, weight_decay=decay).step()
            assert_close(after[name][i], weight, {"rtol": 1e-4, "atol": 1e-6})


def _check_muon(weight: Any, after: Tensor, p: dict[str, Any], pieces: int) -> None:
    """torch's Muon has weights (out, in) and bfloat16: the same to about a hundredth."""
    for start, end in zip(weight.chunk(pieces, -1), after.chunk(pieces, -1), strict=True):
        place = weight.chunk(pieces, -1)
        index = next(n for n, part in enumerate(place) if part.data_ptr() == start.data_ptr())
        twin = torch.nn.Parameter(start.detach().T.contiguous())
        twin.grad = weight.grad.chunk(pieces, -1)[index].T.contiguous()
        muon = torch.optim.Muon(
            [twin],
            p["muon_learning_rate"],
            weight_decay=p["weight_decay"],
            momentum=p["momentum"],
        )
        muon.step()
        step, own = twin.detach().T - start.detach(), end.detach() - start.detach()
        assert float((own - step).norm() / step.norm()) < 0.03


def test_rates_of_muon_for_other_shapes() -> None:
    assert learning_rate_factor(8, 32) == 2.0
    assert learning_rate_factor(32, 8) == 1.0


def test_under_mup_hidden_matrices_move_less() -> None:
    settings = {"parametrization": "mup", "base_width": 4, "optimizer": "adamw"}
    some = members(1, weight_decay=0.0, clip_norm=math.inf, **settings)
    network = task(**settings).build(some)
    flat = FlatParameters(network)
    flat.allocate_grads()
    flat.grads.fill_(1.0)
    flat.steps += 1
    start = {n: p.detach().clone() for n, p in network.named_parameters()}
    ParamGroupUpdate(flat, network, some).step(torch.tensor([0.01]))
    moved = {n: float((p.detach() - start[n]).abs().max()) for n, p in network.named_parameters()}
    assert moved["blocks.0.qkv.weight"] == pytest.approx(0.01 / 4, rel=1e-3)
    assert moved["embedding"] == pytest.approx(0.01, rel=1e-3)


WIDTHS = (32, 64, 128, 256, 512)


def activations(network: StackedGPT, ids: Tensor) -> dict[str, Tensor]:
    """What stands at the places of a GPT: the stream, what each matrix gives, the logits."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name == "blocks.0":
                seen["embedding"] = inputs[0]
            seen[name or "logits"] = output

        return keep

    parts = {n: m for n, m in network.named_modules() if n not in ("blocks", "head")}
    hooks = [module.register_forward_hook(watch(name)) for name, module in parts.items()]
    with torch.no_grad():
        network(ids)
    for hook in hooks:
        hook.remove()
    return seen


def sizes_after_training(width: int, **settings: Any) -> dict[str, tuple[float, float]]:
    """By place: the mean size of activations after five steps, and of their change."""
    settings |= {"base_width": 32, "heads": width // 16, "head_size": 16, "optimizer": "adamw"}
    settings |= {"learning_rate": 0.01, "warmup": 0.0, "weight_decay": 0.0, "clip_norm": math.inf}
    settings |= {"dropout": 0.0, "embedding_rate": 1.0}
    chosen = task(iterations=5 * ROUNDS_PER_BUDGET, **settings)
    cohort = Cohort(members(3, **settings), chosen)
    assert isinstance(cohort.network, StackedGPT)
    ids = chosen.corpus.valid[:64].view(8, 8)
    before = activations(cohort.network, ids)
    cohort.train_round()
    after = activations(cohort.network, ids)
    return {
        place: (float(x.abs().mean()), float((x - before[place]).abs().mean()))
        for place, x in after.items()
    }


def growth(sizes: list[float]) -> float:
    """The power of the width that sizes grow with."""
    x = torch.tensor(WIDTHS, dtype=torch.float64).log()
    y = torch.tensor(sizes, dtype=torch.float64).log()
    x -= x.mean()
    return float(x @ y / (x @ x))


# Not a tied head after "gpt2", whose first block adds twice as much at width 32 as from 64 on.
@pytest.mark.parametrize(
    ("tied_head", "weight_init"), [(False, "fan-in"), (True, "fan-in"), (False, "gpt2")]
)
def test_activations_stay_as_large_over_widths_under_mup_alone(
    tied_head: bool, weight_init: str
) -> None:
    """The coordinate check of Yang et al. 2022 (arXiv:2203.03466), appendix D.1."""
    powers = {}
    for kind in ("mup", "standard"):
        settings = {"parametrization": kind, "weight_init": weight_init, "tied_head": tied_head}
        found = [sizes_after_training(width, **settings) for width in WIDTHS]
        powers[kind] = {
            (place, which): growth([sizes[place][i] for sizes in found])
            for place in found[0]
            for i, which in enumerate(("size", "change"))
        }
    parts = [f"blocks.{i}{part}" for i in (0, 1) for part in ("", ".qkv", ".out", ".up", ".down")]
    places = {(p, w) for p in ("embedding", *parts, "logits") for w in ("size", "change")}
    assert powers["mup"].keys() == powers["standard"].keys() == places
    assert {key: power for key, power in powers["mup"].items() if abs(power) > 0.25} == {}
    for part in ("blocks.0", "blocks.1", "blocks.1.out", "blocks.1.down", "logits"):
        assert powers["standard"][part, "change"] > 0.5
