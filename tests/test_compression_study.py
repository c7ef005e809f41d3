"""Training, the resumable runner, the search and the report of the compression study."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.compression import __main__ as command
from benchmarks.compression import runner as runner_module
from benchmarks.compression.accuracy import accuracy, neighbour_agreement
from benchmarks.compression.ptq import PostTrainingQuantization
from benchmarks.compression.regularization import KINDS, Regularization
from benchmarks.compression.report import write
from benchmarks.compression.runner import Job, Runner, run_job
from benchmarks.compression.splits import TensorSplit
from benchmarks.compression.storage import Storage
from benchmarks.compression.studies import STUDIES
from benchmarks.compression.study import MOST_LOST, Part, Study, chosen, trials
from benchmarks.compression.summary import summarize
from benchmarks.compression.training import DecoupledStepper, Stepper, Training, descend, warm_up_and_cosine
from r2_kernels import reference

COMPRESSIONS = (PostTrainingQuantization(4, "symmetric"), PostTrainingQuantization(2, "asymmetric"))
CANDIDATES = {"linf": (Regularization("linf", 0.01), Regularization("linf", 0.1))}
PART = Part("digits", "MobileNetV1", 0.25, Training(epochs=1), CANDIDATES, COMPRESSIONS, COMPRESSIONS[1:])
STUDY = Study("small", (PART,), seeds=2)

pytestmark = pytest.mark.usefixtures("restored_threads")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_adds_its_gradients(kind: str) -> None:
    """Gradients are those of the kind's value by finite differences along a direction, added to what was there."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    start = 1.0 if kind in ("margin", "soft_min_max") else None
    regularizer = Regularization(kind, 0.3, start).regularizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    regularizer.add_gradients_()
    weights = [model[0].weight, model[1].weight]
    assert all(torch.equal(layer.bias.grad, torch.ones_like(layer.bias)) for layer in model)
    added = [weight.grad - 1 for weight in weights]
    assert all(gradient.abs().max() > 0 for gradient in added)
    if kind == "l2":
        assert all(torch.allclose(gradient, 0.3 * weight) for gradient, weight in zip(added, weights, strict=True))
    if kind == "kurtosis":
        values = reference.kurtosis(weights).mean()
        expected = torch.autograd.grad(0.3 * values, weights)
        assert all(map(torch.allclose, added, expected))
        assert sum(float((a * w.detach()).sum()) for a, w in zip(added, weights, strict=True)) == pytest.approx(0.0)


def test_the_learning_rate_rises_and_falls() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warm_up_and_cosine(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert max(rates) == rates[10] == 2.0
    assert rates[-1] < 0.01
    assert all(before > after for before, after in pairwise(rates[10:]))


def test_a_decoupled_penalty_moves_by_its_strength() -> None:
    """Adam's step of the task's gradient, then strength times the penalty's, whatever the size of the first."""
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[0.1, -2.0, 0.3]])
    start = model.weight.detach().clone()
    regularizer = Regularization("linf", 0.25).regularizer(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    own = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = [torch.optim.lr_scheduler.LambdaLR(one, lambda _: 1.0) for one in (optimizer, own)]
    stepper = DecoupledStepper(optimizer, constant[0], regularizer, own_optimizer=own, own_schedule=constant[1])
    inputs = torch.tensor([[1.0, 1.0, 1.0]])
    descend(model, [(inputs, inputs)], stepper, lambda outputs, _: 1000 * outputs.sum())
    torch.testing.assert_close(model.weight.detach() - start, torch.tensor([[-0.01, -0.01 + 0.25, -0.01]]))


def test_a_diverged_training_is_said_and_kept(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    batch = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    stepper = Stepper(optimizer, warm_up_and_cosine(optimizer, 2))
    with pytest.raises(FloatingPointError, match="diverged"):
        descend(model, [batch] * 2, stepper, lambda outputs, _: outputs.square().sum())
    torch.set_num_threads(1)
    network = replace(PART, training=Training(epochs=1, learning_rate=1e30)).network(Regularization(), 0)
    (line,) = run_job(Job(network, COMPRESSIONS), Runner(None, tmp_path))
    assert "diverged" in line
    assert "diverged" in Storage(tmp_path).cell(network, None)["failure"]
    assert run_job(Job(network, COMPRESSIONS), Runner(None, tmp_path)) == []


def test_accuracy_and_agreement_by_hand() -> None:
    split = TensorSplit(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert accuracy(nn.Identity(), split) == 75.0
    # Neighbours by the labels: 0 and 1, 2 and 3. The model turns vector 1 towards 2.
    wanted = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    given = wanted.clone()
    assert neighbour_agreement(nn.Identity(), TensorSplit(given, wanted)) == 100.0
    given[1] = torch.tensor([0.1, 0.9])
    assert neighbour_agreement(nn.Identity(), TensorSplit(given, wanted)) < 100.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the small study."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("finished")
    STUDY.run(Runner(None, output), lambda _: None)
    torch.set_num_threads(threads)
    return output


def _cells(output: Path) -> list[Path]:
    return sorted(output.rglob("*.json"))


def test_a_study_keeps_each_cell_with_its_settings(finished: Path) -> None:
    kept = [json.loads(path.read_text()) for path in _cells(finished)]
    # The search: three trainings with one compression each; then for two kinds two seeds with two compressions.
    assert len(kept) == 3 * 2 + 2 * 1 + 2 * 3
    for cell in kept:
        assert cell["network"]["training"]["epochs"] == 1
        assert 0 <= cell["validation"] <= 100
        assert cell["torch"] == torch.__version__
    two_bits = [cell for cell in kept if cell["compression"] and cell["compression"]["bits"] == 2]
    assert {cell["network"]["seed"] for cell in two_bits} == {0, 1}
    trained = [cell for cell in kept if cell["compression"] is None]
    for cell in trained:
        assert [entry["epoch"] for entry in cell["history"]] == [0, 1]
        assert sum(cell["histogram"]["counts"]) == 32 * 32


def test_finished_cells_are_not_run_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    before = {path: path.read_bytes() for path in _cells(output)}
    removed = [path for path in before if path.parent.name == "plain-seed1" and path.name.startswith("ptq-4bit")]
    assert len(removed) == 1
    removed[0].unlink()
    lines: list[str] = []
    monkeypatch.setattr(runner_module, "train", None)  # No network is trained again.
    STUDY.run(Runner(None, output), lines.append)
    assert [line for line in lines if "%" in line] == [line for line in lines if "plain-seed1 ptq-4bit" in line]
    for path in _cells(output):
        if path != removed[0]:
            assert path.read_bytes() == before[path]
    again = json.loads(removed[0].read_text())
    first = json.loads(before[removed[0]])
    assert (again["validation"], again["test"]) == (first["validation"], first["test"])


def test_cells_of_other_settings_are_not_taken(finished: Path) -> None:
    other = replace(PART, training=Training(epochs=1, learning_rate=0.01))
    with pytest.raises(ValueError, match=r"--output: expected the cell .* to have been made with network"):
        chosen(other, Storage(finished))


def test_lost_weights_are_said(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    network = PART.network(Regularization(), 0)
    (output / network.folder() / "weights.pt").unlink()
    with pytest.raises(FileNotFoundError, match="--output: expected the weights"):
        run_job(Job(network, (PostTrainingQuantization(8, "symmetric"),)), Runner(None, output))


def _keep_trial(storage: Storage, settings: Regularization, full: float, compressed: float) -> None:
    network = PART.network(settings, 0)
    result = {"validation": full, "test": 100 - full, "seconds": 0.0, "torch": "", "threads": 1, "device": "cpu"}
    storage.keep(network, None, result)
    storage.keep(network, COMPRESSIONS[1], result | {"validation": compressed, "test": 100 - compressed})


@pytest.mark.parametrize(
    ("weak", "strong", "expected"),
    [
        ((90.0, 50.0), (90.0 - MOST_LOST, 60.0), 0.1),  # both eligible: the better one
        ((90.0, 50.0), (89.9 - MOST_LOST, 60.0), 0.01),  # the better one costs too much
        ((80.0, 50.0), (81.0, 40.0), 0.1),  # neither is eligible: what costs least
    ],
)
def test_settings_are_chosen_by_validation(
    weak: tuple[float, float], strong: tuple[float, float], expected: float, tmp_path: Path
) -> None:
    storage = Storage(tmp_path)
    assert trials(PART, storage) == []
    _keep_trial(storage, Regularization(), 90.0, 40.0)
    _keep_trial(storage, CANDIDATES["linf"][0], *weak)
    _keep_trial(storage, CANDIDATES["linf"][1], *strong)
    assert chosen(PART, storage) == {None: Regularization(), "linf": Regularization("linf", expected)}


def test_fine_tuning_starts_from_the_plain_network(finished: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    output = tmp_path / "copy"
    shutil.copytree(finished, output)
    gentle = replace(PART, training=Training(epochs=1, learning_rate=1e-6), pretraining=PART.training)
    lines: list[str] = []
    replace(STUDY, parts=(gentle,), seeds=1).run(Runner(None, output), lines.append)
    assert not any("1epochs/plain-seed0 full precision" in line for line in lines)  # it is there already
    storage = Storage(output)
    before = storage.weights(PART.network(Regularization(), 0))
    after = storage.weights(gentle.network(Regularization("linf", 0.1), 0))
    torch.testing.assert_close(after["head.weight"], before["head.weight"], atol=1e-4, rtol=0)
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_report_is_made_from_stored_cells(finished: Path, tmp_path: Path) -> None:
    page = write(STUDY, finished, tmp_path / "results").read_text()
    summary = summarize(PART, STUDY.seeds, Storage(finished))
    (row,) = (row for row in summary.rows if row.compression == COMPRESSIONS[1])
    values = [
        json.loads(path.read_text())["test"]
        for path in _cells(finished)
        if path.parent.name.startswith("plain") and path.name.startswith("ptq-2bit")
    ]
    assert sorted(row.accuracies[None]) == sorted(values)
    mean = sum(values) / 2
    spread = ((values[0] - mean) ** 2 + (values[1] - mean) ** 2) ** 0.5
    assert f"{mean:.2f} ± {spread:.2f}" in page
    (verdict,) = summary.verdicts()
    assert verdict.gain == pytest.approx(row.means()["linf"] - mean)
    assert f"{verdict.gain:+.2f} points" in page
    assert page.count("chosen") >= 1
    for name in ("accuracy", "weights", "ranges"):
        image = tmp_path / "results" / "images" / f"small-digits-MobileNetV1-{name}.png"
        assert image.stat().st_size > 5_000
        assert f"images/{image.name}" in page
    numbers = json.loads((tmp_path / "results" / "small.json").read_text())
    assert len(numbers) == 2 * 2 * 3


def test_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected finished cells of the study small"):
        write(STUDY, tmp_path, tmp_path / "results")


def test_names_of_a_study_are_unique() -> None:
    for study in STUDIES.values():
        folders = [
            part.network(settings, 0).folder()
            for part in study.parts
            for choices in part.candidates.values()
            for settings in choices
        ]
        assert len(set(folders)) == len(folders)
        for part in study.parts:
            names = [str(compression) for compression in part.compressions]
            assert len(set(names)) == len(names)
            assert set(part.criteria) <= set(part.compressions)


def test_the_command_goes_on_and_reports(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(STUDIES, "small", STUDY)
    arguments = ["small", "--output", str(finished), "--results", str(tmp_path)]
    assert command.main(["run", *arguments, "--workers", "1"]) == 0
    assert "finished" in capsys.readouterr().out
    (tmp_path / "small.md").unlink()
    assert command.main(["report", *arguments]) == 0
    assert (tmp_path / "small.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "mnist"], "invalid choice: 'mnist'"),
        (["run", "quick", "--model", "VGG"], "--model: expected one of"),
        (["run", "quick", "--penalty", "l7"], "--penalty: expected one of"),
        (["report", "quick", "--seeds", "0"], "--seeds: expected at least 1"),
        (["run", "quick", "--workers", "0"], "--workers: expected at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_says_when_data_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "cifar10", "--data", str(tmp_path), "--output", str(tmp_path / "output"), "--workers", "1"]
    assert command.main(arguments) == 2
    assert "--data: expected a folder with cifar10_train.npz" in capsys.readouterr().err
