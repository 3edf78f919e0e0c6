"""A watcher over a meter and a clock that are set by hand: what is read when, what is left out, what is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from watch_toys import LENGTH, FakeClock, FakeMeter, make_batch, plan_job, say_of  # noqa: E402

import brim  # noqa: E402
from brim.cost.estimate import peak_bytes  # noqa: E402
from brim.cost.ledger import StepTime  # noqa: E402
from brim.errors import InvalidFile  # noqa: E402
from brim.runtime.forecast import Forecast  # noqa: E402
from brim.runtime.lengths import find_longest  # noqa: E402
from brim.runtime.observe import Task, Watcher  # noqa: E402
from brim.runtime.run_record import RUN_FILE, RunRecord, read_run  # noqa: E402
from brim.runtime.tokens import count_tokens  # noqa: E402
from brim.units import MIB  # noqa: E402

PLAN = say_of(plan_job(), 100 * MIB, budget_bytes=900 * MIB)


class Toy:
    """A run of steps of one second, each of which peaks at `peak`."""

    def __init__(self, plan: Any = PLAN, folder: Path | None = None, **said: Any) -> None:
        self.lines: list[str] = []
        self.meter, self.clock, self.plan = FakeMeter(), FakeClock(), plan
        strategy = plan.strategy if plan is not None else PLAN.strategy
        task = Task(plan=plan, strategy=strategy, folder=str(folder) if folder else None, **said)
        self.watcher = Watcher(task, self.meter, tell=self.lines.append, clock=self.clock, note=self.noted)
        self.observations: list[Any] = []

    def noted(self, observation: Any) -> None:
        self.observations.append(observation)

    def step(
        self, peak: int = 100 * MIB, reserved: int | None = None, seconds: float = 1.0, batch: Any = None, **said: Any
    ) -> None:
        self.watcher.begin_step()
        for _ in range(2):
            self.watcher.add(batch if batch is not None else make_batch(2, LENGTH))
        self.meter.take(peak, reserved)
        self.clock.now += seconds
        self.watcher.end_step(**said)

    def steps(self, number: int, **said: Any) -> None:
        for _ in range(number):
            self.step(**said)

    @property
    def codes(self) -> list[str]:
        return [verdict.code for verdict in self.watcher.verdicts]


def read(folder: Path) -> RunRecord:
    path = folder / RUN_FILE
    return read_run(path.read_bytes(), path=str(path))


def test_a_run_as_planned_says_one_line(tmp_path: Path) -> None:
    toy = Toy(folder=tmp_path)
    toy.steps(60)
    observation = toy.watcher.finish()
    assert len(toy.lines) == 1 and toy.lines[0].startswith("brim: step 3: tensors peak at 100.0 MiB of a budget")
    record = read(tmp_path)
    assert (record.state, record.measured.num_steps, record.verdicts) == ("ended", 60, ())
    assert record.observation == observation == toy.observations[0]
    assert record.expected is not None and record.expected.prediction.peak_allocated_bytes == 100 * MIB
    assert (observation.num_steps, observation.fits, observation.kind) == (60, True, "watch")
    assert observation.peak_allocated_bytes == 100 * MIB and observation.longest_tokens == LENGTH
    assert observation.step_seconds == pytest.approx(1.0)
    assert observation.tokens_per_second == pytest.approx(2 * 2 * LENGTH)
    assert json.loads((tmp_path / RUN_FILE).read_text())["schema_version"] == 1


def test_the_first_step_is_left_out() -> None:
    toy = Toy()
    toy.step(peak=700 * MIB, seconds=90.0)  # guard measures, the device warms up
    toy.steps(5)
    found = toy.watcher.finish()
    assert found.peak_allocated_bytes == 100 * MIB
    assert found.step_seconds == pytest.approx(1.0)
    assert toy.meter.num_resets == 2


def test_lengths_count_with_the_peaks_they_belong_to() -> None:
    toy = Toy()
    toy.step(batch=make_batch(2, 512))  # the first step's peak is left out, and so is its length
    toy.steps(3)
    toy.watcher.add(make_batch(2, 1024))  # a step that memory runs out in
    assert toy.watcher.finish("out of memory").longest_tokens == LENGTH


def test_longer_sequences_than_planned_are_another_job() -> None:
    toy = Toy()
    toy.steps(4, batch=make_batch(2, 3 * LENGTH))
    found = toy.watcher.finish()
    assert found.workload.data.seq_len == found.longest_tokens == 3 * LENGTH and found.predicted is None
    assert replace(found.workload, data=PLAN.workload.data) == PLAN.workload


def test_the_card_held_at_least_what_the_allocator_did() -> None:
    toy = Toy()
    toy.steps(5, reserved=500 * MIB)
    toy.meter.reserved = 10 * MIB
    assert toy.watcher.finish().device_bytes == 500 * MIB


def test_a_run_of_one_step_is_all_there_is() -> None:
    toy = Toy(last_step=1)
    toy.step(peak=150 * MIB, seconds=3.0)
    found = toy.watcher.finish()
    assert (found.peak_allocated_bytes, found.step_seconds, found.num_steps) == (150 * MIB, 3.0, 1)
    assert toy.codes == ["estimate_low"]


def test_evaluation_is_no_step(tmp_path: Path) -> None:
    toy = Toy(folder=tmp_path)
    for number in range(12):
        toy.step(looks=number % 3 == 0)
        if number % 3 == 0:
            toy.meter.take(400 * MIB)  # a large evaluation batch
            toy.clock.now += 50.0
            toy.watcher.set_aside()
    found = toy.watcher.finish()
    assert found.step_seconds == pytest.approx(1.0)
    assert found.peak_allocated_bytes == 100 * MIB and found.peak_reserved_bytes is None
    assert read(tmp_path).measured.aside_bytes == 400 * MIB
    assert toy.codes == []


def test_evaluation_above_the_budget_is_said_to_be_evaluation() -> None:
    toy = Toy()
    toy.steps(4)
    toy.watcher.look()
    toy.meter.take(950 * MIB)
    toy.watcher.set_aside()
    toy.steps(6)
    assert toy.codes == ["evaluation_over_budget"]


def test_an_estimate_that_is_too_low_is_said_at_once_and_once() -> None:
    toy = Toy(say_of(plan_job(), 50 * MIB, budget_bytes=900 * MIB))
    toy.steps(2)
    assert toy.codes == ["estimate_low"]
    toy.steps(60)
    assert toy.codes == ["estimate_low"] and sum("estimate says" in line for line in toy.lines) == 1


def test_a_length_still_to_come_is_weighed() -> None:
    short, long = LENGTH, 8 * LENGTH
    said = peak_bytes(plan_job().workload, plan_job().strategy)
    toy = Toy(replace(plan_job(), budget_bytes=round(1.2 * said)), coming_tokens=long)
    toy.steps(3, peak=said, batch=make_batch(2, short))
    (verdict,) = toy.watcher.verdicts
    assert verdict.code == "peak_ahead" and f"{long:,} tokens" in verdict.text
    assert short < verdict.facts["fitting_tokens"] < long
    assert verdict.facts["ratio"] == pytest.approx(1.0)


def test_the_planned_length_comes_where_nobody_knows() -> None:
    said = peak_bytes(plan_job().workload, plan_job().strategy)
    toy = Toy(replace(plan_job(), budget_bytes=round(1.1 * said)))
    forecast = Forecast(plan_job(), plan_job().strategy)
    toy.steps(3, peak=round(1.2 * forecast.peak(16)), batch=make_batch(2, 16))
    (verdict, _) = toy.watcher.verdicts
    assert verdict.code == "peak_ahead" and verdict.facts["coming_tokens"] == LENGTH
    assert verdict.facts["fitting_micro_batch_size"] == 1 and verdict.facts["fitting_accumulation_steps"] == 4


def test_fragments_are_told_from_growth() -> None:
    toy = Toy()
    toy.steps(5, reserved=110 * MIB)
    toy.steps(5, peak=300 * MIB, reserved=320 * MIB)
    assert "fragmentation" not in toy.codes  # tensors grew too
    toy.steps(10, reserved=600 * MIB)
    verdict = next(one for one in toy.watcher.verdicts if one.code == "fragmentation")
    assert "expandable_segments" in verdict.text and "0.11 GiB at step 3" in verdict.text


def test_retries_before_the_run_do_not_count() -> None:
    toy = Toy()
    toy.meter.retries = 0
    toy.steps(3)
    toy.meter.retries = 2
    toy.steps(2)
    assert toy.codes == ["retries"]
    found = toy.watcher.finish()
    assert not found.fits and found.num_retries == 2 and "2 allocator retries" in found.problem


def test_a_run_that_slows_down() -> None:
    toy = Toy()
    toy.steps(20)
    toy.steps(10, seconds=3.0)
    assert "slowing" not in toy.codes  # one slow stretch may be anything
    toy.steps(10, seconds=3.0)
    assert "slowing" in toy.codes


def test_a_step_slower_than_predicted_for_its_tokens() -> None:
    time = StepTime(fixed_seconds=0, micro_batch_seconds=0.8, step_seconds=1.6, tokens_per_second_per_device=1.0)
    plan = replace(PLAN, estimate=replace(PLAN.estimate, step_time=time))
    toy = Toy(plan)
    for share, seconds, slow in ((1, 1.0, False), (2, 1.0, False), (4, 1.0, True), (1, 2.5, True)):
        toy = Toy(plan)  # half the tokens: 0.8 s were predicted
        toy.steps(3, seconds=seconds, batch=make_batch(2, LENGTH // share))
        assert ("slow" in toy.codes) == slow


def test_padding_is_counted() -> None:
    toy = Toy()
    toy.steps(5, batch=make_batch(2, LENGTH, real=LENGTH // 2))
    assert toy.codes == ["padding"]
    assert toy.watcher.finish().tokens_per_second == pytest.approx(2 * 2 * LENGTH / 2)
    assert "tokens/s of" in toy.watcher.verdicts[0].text


def test_logs_hold_what_happened_since_the_last() -> None:
    toy = Toy()
    toy.steps(3)
    first = toy.watcher.read_log()
    assert first["memory/peak_allocated_bytes"] == 100 * MIB and first["speed/step_seconds"] == pytest.approx(1.0)
    toy.steps(2, seconds=2.0)
    assert toy.watcher.read_log()["speed/step_seconds"] == pytest.approx(2.0)
    assert "speed/step_seconds" not in toy.watcher.read_log()


def test_without_a_meter_time_and_tokens_are_watched(tmp_path: Path) -> None:
    clock = FakeClock()
    task = Task(plan=PLAN, strategy=PLAN.strategy, folder=str(tmp_path))
    watcher = Watcher(task, None, tell=lambda line: None, clock=clock)
    for _ in range(3):
        watcher.begin_step()
        watcher.add(make_batch(2, LENGTH))
        clock.now += 1.0
        watcher.end_step()
    assert set(watcher.read_log()) == {"speed/step_seconds", "speed/tokens_per_second", "speed/padding_fraction"}
    found = watcher.finish()
    assert found.peak_allocated_bytes is None and found.tokens_per_second == pytest.approx(2 * LENGTH)
    assert read(tmp_path).measured.capacity_bytes is None


def test_without_a_plan_there_is_a_record_and_no_observation(tmp_path: Path) -> None:
    toy = Toy(None, folder=tmp_path)
    toy.steps(5)
    assert toy.watcher.finish() is None and toy.observations == []
    record = read(tmp_path)
    assert record.expected is None and record.observation is None and record.measured.num_steps == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    _run_unwritable(folder)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "file"
    folder.write_text("", encoding="utf-8")
    _run_unwritable(folder)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    _run_unwritable(tmp_path, "No space left on device")


def _run_unwritable(folder: Path, why: str = "") -> None:
    toy = Toy(folder=folder)
    toy.steps(60)
    assert toy.watcher.finish().num_steps == 60
    assert sum("without its record" in line and why in line for line in toy.lines) == 1


@pytest.mark.parametrize("breaks", ["meter", "note", "tokens"])
def test_what_goes_wrong_in_watching_stops_nothing(breaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    toy.steps(3)
    if breaks == "meter":
        toy.meter.fails = True
    elif breaks == "note":
        toy.watcher._note = lambda observation: 1 / 0
    else:
        monkeypatch.setattr("brim.runtime.pace.count_tokens", lambda inputs: 1 / 0)
    toy.steps(60)
    toy.watcher.read_log()
    toy.watcher.finish()
    assert sum("watching it failed" in line for line in toy.lines) == 1


def test_a_run_that_died(tmp_path: Path) -> None:
    toy = Toy(folder=tmp_path)
    toy.steps(4)
    toy.meter.ooms = 1
    found = toy.watcher.finish("out of memory")
    assert not found.fits and found.problem == "out of memory"
    assert (read(tmp_path).state, read(tmp_path).problem) == ("died", "out of memory")


def test_another_rank_neither_speaks_nor_writes(tmp_path: Path) -> None:
    toy = Toy(say_of(plan_job(), 50 * MIB), folder=tmp_path, is_first=False)
    toy.steps(10)
    assert toy.watcher.finish() is None
    assert toy.lines == [] and list(tmp_path.iterdir()) == [] and toy.observations == []


def test_the_plain_form(tmp_path: Path) -> None:
    notes: list[Any] = []
    loader = [make_batch(2, LENGTH), make_batch(2, 64)] * 4
    with brim.watch(PLAN, folder=str(tmp_path), note=notes.append, tell=lambda line: None) as w:
        for number, batch in enumerate(w.steps(loader, per_step=2)):
            assert batch is loader[number]
            with w.aside():
                pass
    assert w.observation.num_steps == 4 and notes == [w.observation]
    assert w.observation.longest_tokens == LENGTH and read(tmp_path).state == "ended"


def test_the_plain_form_step_by_step() -> None:
    lines: list[str] = []
    with brim.watch(PLAN, tell=lines.append) as w:
        for number in range(3):
            w.step(loss=torch.tensor(30.0 - number), inputs=[make_batch(1, 8), make_batch(1, 16)])
    assert w.observation.num_steps == 3 and w.observation.longest_tokens == 16
    assert [verdict.code for verdict in w.verdicts] == ["loss_scale"]


def test_the_plain_form_lets_errors_through(tmp_path: Path) -> None:
    def loop() -> None:
        with brim.watch(PLAN, folder=str(tmp_path), tell=lambda line: None) as w:
            w.step()
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        loop()
    assert (read(tmp_path).state, read(tmp_path).problem) == ("died", "out of memory")


@pytest.mark.parametrize(("inputs", "found"), [
    (make_batch(2, 8, real=5), (2, 8, 16, 10)),
    ({"input_ids": torch.ones(2, 8)}, (2, 8, 16, 16)),
    ({"input_ids": torch.ones(1, 30), "position_ids": torch.ones(1, 30)}, (1, 30, 30, 30)),
    ({"input_ids": torch.ones(2, 8), "attention_mask": torch.ones(2, 1, 8, 8)}, (2, 8, 16, 16)),
    ({"chosen_input_ids": torch.ones(2, 8), "chosen_attention_mask": torch.ones(2, 8).tril(),
      "rejected_input_ids": torch.ones(2, 4), "rejected_attention_mask": torch.ones(2, 4)}, (2, 8, 24, 11)),
    ({"inputs_embeds": torch.ones(2, 8, 4), "attention_mask": torch.ones(2, 8)}, (2, 8, 16, 16)),
])  # fmt: skip
def test_tokens_of_a_batch(inputs: dict[str, Any], found: tuple[int, ...]) -> None:
    tokens = count_tokens(inputs)
    assert tokens is not None
    real = tokens.unmasked + sum(int(mask.sum()) for mask in tokens.masks)
    assert (tokens.rows, tokens.longest, tokens.run, real) == found


def test_what_has_no_tokens() -> None:
    assert count_tokens({"pixel_values": torch.ones(2, 3, 4, 4)}) is None
    assert count_tokens([{"prompt": "a"}]) is None


def test_longest_of_a_dataset() -> None:
    rows = [{"input_ids": [1] * n} for n in (3, 9, 5)]
    assert find_longest(rows) == 9
    assert find_longest([]) is None and find_longest(None) is None
    assert find_longest([{"text": "a"}]) is None
    datasets = pytest.importorskip("datasets")
    assert find_longest(datasets.Dataset.from_list(rows)) == 9
    assert find_longest(datasets.Dataset.from_list(rows).shuffle(seed=0)) == 9
    assert find_longest(datasets.Dataset.from_list([{"length": 7}, {"length": 4}])) == 7
    assert find_longest(datasets.Dataset.from_list([{"text": "a"}])) is None


def test_forecasts_follow_the_plans_own_answerer() -> None:
    plan = plan_job()
    own = Forecast(plan, plan.strategy)
    twice = Forecast(say_of(plan, 2 * plan.estimate.peak_allocated_bytes), plan.strategy)
    assert own.peak(LENGTH) == plan.estimate.peak_allocated_bytes
    half = Forecast(say_of(plan, plan.estimate.peak_allocated_bytes // 2), plan.strategy)
    assert twice.peak(512) == pytest.approx(2 * own.peak(512), rel=1e-6)
    assert half.peak(512) - half.peak(LENGTH) == pytest.approx(own.peak(512) - own.peak(LENGTH), rel=1e-6)
    assert own.peak(512) > own.peak(LENGTH) > own.peak(16)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda record: record | {"schema_version": 9}, "schema version 9"),
    (lambda record: record | {"colour": "red"}, "colour"),
    (lambda record: record | {"state": "walking"}, "state"),
    (lambda record: {name: value for name, value in record.items() if name != "measured"}, "measured"),
    (lambda record: [record], "no watched run"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=lambda value: str(value)[:20])
def test_a_record_that_is_broken_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    toy = Toy(folder=tmp_path)
    toy.steps(3)
    record = json.loads((tmp_path / RUN_FILE).read_text(encoding="utf-8"))
    with pytest.raises(InvalidFile, match=words):
        read_run(json.dumps(change(record)), path="brim-run.json")
    with pytest.raises(InvalidFile):
        read_run("{", path="brim-run.json")


def test_attention_that_keeps_its_scores_is_told_by_what_is_missing() -> None:
    eager = replace(plan_job().strategy, attention_kernel="eager")
    forecast = Forecast(plan_job(), plan_job().strategy, "toy")
    short, long = forecast.peak(LENGTH, eager), forecast.peak(8 * LENGTH, eager)
    assert short is not None and long is not None and forecast.scores(LENGTH) == short - forecast.peak(LENGTH)
    assert forecast.scores(LENGTH, eager) == 0
    toy = Toy(replace(plan_job(), budget_bytes=round(0.98 * long)), coming_tokens=8 * LENGTH)
    missing = round(1.5 * (short - forecast.peak(LENGTH)))  # a kernel keeps more than the scores alone
    toy.steps(3, peak=forecast.peak(LENGTH) + max(missing, round(0.031 * short)))
    (verdict,) = toy.watcher.verdicts
    assert verdict.code == "peak_ahead" and verdict.facts["coming_peak_bytes"] > long


def test_a_cpu_has_no_workspaces() -> None:
    card, cpu = (Forecast(plan_job(), plan_job().strategy, name) for name in ("toy", "cpu"))
    for length in (LENGTH, 4 * LENGTH):
        assert card.peak(length) - cpu.peak(length) == 2 * (2 * 4096 + 8 * 16) * 1024
