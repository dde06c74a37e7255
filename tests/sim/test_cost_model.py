"""The cost model: never less time for more work, stages in order, a fit that finds the model it was made from."""

from __future__ import annotations

import itertools
import random
import statistics

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orcaserve.core.batch import Batch, ScheduledRequest, Swap
from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.step_log import Arrived, Header, Log, Returned, Submitted
from orcaserve.sim.cost import CostModel, Residuals, Size, StageCost, mixed, size, size_of
from orcaserve.sim.executor import SimExecutor, VirtualClock
from orcaserve.sim.fit import fit, fit_stage, fit_stages, nnls, turns_of
from orcaserve.sim.hardware import HARDWARE, Parallel, derive, equal_layers, hardware, kv_tokens
from orcaserve.sim.run import Arrival, simulate
from orcaserve.sim.shape import SHAPES
from orcaserve.sim.stages import balanced, equal, shares, spans

terms = st.builds(StageCost, **{name: st.floats(0, 1, allow_subnormal=False) for name in StageCost.__struct_fields__})
counts = st.integers(0, 1000)
sizes = st.builds(Size, counts, counts, counts, counts, counts)
rows = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500), st.booleans()), min_size=1, max_size=9)


def batch_of(given: list[tuple[int, int, bool]], step: int = 1) -> Batch:
    scheduled = [ScheduledRequest(id, start, count, samples=does) for id, (start, count, does) in enumerate(given)]
    return Batch(step=step, rows=tuple(scheduled))


def config(depth: int = 1, **changes: int) -> SchedulerConfig:
    fields = {"max_batch_size": 8, "max_batch_tokens": 64, "num_blocks": 500, "block_size": 16, "depth": depth}
    return SchedulerConfig(policy=POLICIES["default"], **(fields | changes))


@given(terms, sizes, st.integers(0, 4), st.integers(0, 1000))
def test_more_work_never_takes_less_time(cost: StageCost, of: Size, which: int, more: int) -> None:
    larger = of._replace(**{of._fields[which]: of[which] + more})
    assert 0 <= cost(of) <= cost(larger)


@given(rows)
def test_a_batch_is_as_large_as_its_rows(given_rows: list[tuple[int, int, bool]]) -> None:
    of = size(batch_of(given_rows))
    assert of == size_of(given_rows)
    assert of.attended == sum(start + i + 1 for start, count, _ in given_rows for i in range(count))


@given(st.lists(terms, min_size=1, max_size=4), st.lists(st.tuples(rows, st.floats(0, 1)), min_size=1, max_size=9))
def test_stages_never_overlap(stages: list[StageCost], batches: list) -> None:
    """A stage has one batch at a time, a batch is in one stage at a time, and both keep their order."""
    clock = VirtualClock()
    executor = SimExecutor(CostModel(stages=tuple(stages)), clock, host=lambda batch: 0.001)
    spans = []
    for given_rows, wait in batches:
        spans.append(executor.submit(batch_of(given_rows)).spans)
        clock.advance_to(clock.now + wait)
    for of_batch in spans:
        assert len(of_batch) == len(stages)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(of_batch))
    for of_stage in zip(*spans, strict=True):
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(of_stage))


@pytest.mark.parametrize("stages", [1, 2])
def test_a_block_that_is_swapped_takes_its_time(stages: int) -> None:
    """Each stage copies its own layers: together they take as long as one that has all."""
    cost = CostModel(stages=(StageCost(fixed=0.25),) * stages)
    swaps = (Swap(True, (0, 1), (0, 1)), Swap(False, (2,), (3,)))
    executor = SimExecutor(cost, VirtualClock(), copy_seconds=0.5)
    plain = executor.submit(batch_of([(0, 1, True)]))
    swapping = executor.submit(msgspec.structs.replace(batch_of([(0, 1, True)]), swaps=swaps))
    spent = [sum(end - start for start, end in pending.spans) for pending in (plain, swapping)]
    assert spent == pytest.approx([0.25 * stages, 0.25 * stages + 1.5])


def test_two_stages_with_two_batches_in_flight_take_half_the_time() -> None:
    """The paper's pipelining: no bubbles while there are batches enough."""
    half = StageCost(fixed=0.05)
    arrivals = [Arrival(0.0, 8, 100)] * 16
    whole = {}
    for depth in (1, 2):
        records, _ = simulate(arrivals, config(depth), CostModel(stages=(half, half)))
        whole[depth] = max(record.token_times[-1] for record in records)
    assert whole[2] == pytest.approx(whole[1] / 2, rel=0.1)


def test_two_stages_wait_little_for_each_other_at_saturation() -> None:
    """Prompts come and go among decodes: where a batch has all of one and the next has none, stages idle."""
    rng = random.Random(0)
    arrivals = [Arrival(0.0, rng.randint(32, 512), rng.randint(1, 128)) for _ in range(200)]
    ends = []
    for depth, fixed, per_token in ((1, 0.005, 0.0008), (2, 0.0025, 0.0004)):
        cost = CostModel(stages=(StageCost(fixed=fixed, per_token=per_token),) * depth)
        setup = config(depth, max_batch_size=32, max_batch_tokens=512, num_blocks=10_000)
        records, _ = simulate(arrivals, setup, cost)
        ends.append(max(record.token_times[-1] for record in records))
    assert ends[0] / ends[1] > 1.85


def test_two_stages_read_a_lone_prompt_in_half_the_time() -> None:
    half = StageCost(per_token=0.001)
    took = {}
    for depth in (1, 2):
        records, _ = simulate([Arrival(0.0, 4000, 1)], config(depth), CostModel(stages=(half, half)))
        took[depth] = records[0].token_times[0]
    assert took[2] == pytest.approx(took[1] / 2, rel=0.1)


@given(st.integers(1, 12), st.integers(1, 60), st.floats(0, 40))
def test_stages_are_as_short_as_can_be(stages: int, layers: int, behind: float) -> None:
    assume(stages <= layers)
    cut = shares(layers, behind, stages)
    assert sum(cut) == layers and len(cut) == stages and min(cut) >= 1
    longest = max(*cut[:-1], cut[-1] + behind) if stages > 1 else cut[0] + behind
    for last in range(1, layers - stages + 2 if stages > 1 else 1):
        assert longest <= max(-(-(layers - last) // (stages - 1)), last + behind) + 1e-9
    assert spans(cut)[0][0] == 0 and spans(cut)[-1][1] == layers
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans(cut)))


def test_a_large_vocabulary_takes_layers_off_the_last_stage() -> None:
    shape = msgspec.structs.replace(SHAPES["13B"], layers=28, hidden=1024, intermediate=3072, matrices=3, vocab=151936)
    assert equal(28, 2) == ((0, 14), (14, 28))
    [(_, cut), (same, end)] = balanced(shape, HARDWARE["zen4-core"], 2)
    assert 14 < cut == same < end == 28
    with pytest.raises(ValueError, match="28 layers make no 29 stages"):
        balanced(shape, HARDWARE["zen4-core"], 29)


@given(st.integers(0, 2**64), st.integers(0, 2**40))
def test_noise_is_a_function_of_its_seed(seed: int, number: int) -> None:
    assert mixed(seed, number) == mixed(seed, number) < 2**64
    assert mixed(seed, number) != mixed(seed, number + 1)


def test_short_iterations_have_a_noise_of_their_own() -> None:
    bands = (Residuals(0.0, (2.0,)), Residuals(0.5, (1.5,)))
    cost = CostModel(stages=(StageCost(per_token=0.1),), residuals=bands).noisy(1)
    assert cost(batch_of([(0, 1, True)]))[0] == pytest.approx(0.2)
    assert cost(batch_of([(0, 10, True)]))[0] == pytest.approx(1.5)


def test_noise_is_drawn_from_the_residuals() -> None:
    cost = CostModel(stages=(StageCost(fixed=1.0),), residuals=(Residuals(0.0, (0.5, 1.0, 3.0)),))
    drawn = [cost.noisy(7)(batch_of([(0, 1, True)], step))[0] for step in range(3000)]
    assert set(drawn) == {0.5, 1.0, 3.0}
    assert statistics.mean(drawn) == pytest.approx(1.5, rel=0.05)
    assert drawn != [cost.noisy(8)(batch_of([(0, 1, True)], step))[0] for step in range(3000)]


def test_stages_vary_one_by_one() -> None:
    bands = (Residuals(0.0, (1.0, 3.0)), Residuals(1.5, (1.25, 1.5)))
    cost = CostModel(stages=(StageCost(fixed=1.0), StageCost(fixed=2.0), StageCost(fixed=1.0)), residuals=bands).noisy(
        7
    )
    drawn = [cost(batch_of([(0, 1, True)], step)) for step in range(3000)]
    assert {(first, last) for first, _, last in drawn} == {(1.0, 1.0), (1.0, 3.0), (3.0, 1.0), (3.0, 3.0)}
    assert {middle for _, middle, _ in drawn} == {2.5, 3.0}, "a stage's own time chooses the band"
    alone = CostModel(stages=(StageCost(fixed=1.0),), residuals=bands).noisy(7)
    assert [first for first, *_ in drawn] == [alone(batch_of([(0, 1, True)], step))[0] for step in range(3000)]


def test_stages_are_fitted_one_by_one() -> None:
    first, last = StageCost(fixed=2e-3, per_token=1e-3), StageCost(fixed=1e-3, per_token=5e-4, per_sample=1e-4)
    samples = [observed(stage, 0.05, 0.0, seed) for seed, stage in enumerate((first, last))]
    found = fit_stages(samples)
    for stage, truth in zip(found.stages, (first, last), strict=True):
        for of, _ in samples[0][:100]:
            assert stage(of) == pytest.approx(truth(of), rel=0.03)
    assert statistics.pstdev(found.residuals[0].factors) == pytest.approx(0.05, rel=0.2)


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=20), st.randoms())
def test_non_negative_least_squares_is_a_minimum(matrix: list[list[float]], rng: random.Random) -> None:
    wanted = [rng.uniform(-5, 5) for _ in matrix]
    weights = [1.0] * len(matrix)

    def loss(x: list[float]) -> float:
        return sum(
            (sum(a * b for a, b in zip(x, row, strict=True)) - value) ** 2
            for row, value in zip(matrix, wanted, strict=True)
        )

    found = nnls(matrix, wanted, weights)
    assert all(value >= 0 for value in found)
    for _ in range(30):
        other = [max(0.0, value + rng.choice([0, 0, 1e-3, -1e-3, 0.1, -0.1])) for value in found]
        assert loss(found) <= loss(other) * (1 + 1e-6) + 1e-6


def truth() -> StageCost:
    return StageCost(
        fixed=2e-3, weights=8 * 1e-3, per_token=1e-3, per_row=2e-4, per_context=3e-6, per_attended=1e-7, head=4e-3
    )


def observed(cost: StageCost, noise: float, outliers: float, seed: int) -> list[tuple[Size, float]]:
    rng = random.Random(seed)
    found = []
    for _ in range(1500):
        given_rows = [(rng.randint(1, 900), 1, True) for _ in range(rng.randint(0, 16))]
        if not given_rows or rng.random() < 0.4:
            given_rows.append((rng.choice([0, 0, 64, 256]), rng.randint(2, 128), rng.random() < 0.3))
        of = size_of(given_rows)
        factor = 8.0 if rng.random() < outliers else rng.gauss(1, noise)
        found.append((of, cost(of) * factor))
    return found


@pytest.mark.parametrize(("noise", "outliers", "within"), [(0.0, 0.0, 0.001), (0.05, 0.0, 0.03), (0.03, 0.05, 0.04)])
def test_a_fit_finds_the_model_that_made_the_times(noise: float, outliers: float, within: float) -> None:
    found = fit_stage(observed(truth(), noise, outliers, seed=5))
    for of, seconds in observed(truth(), 0.0, 0.0, seed=6):
        assert found(of) == pytest.approx(seconds, rel=within if of.tokens > 1 else 2 * within + 0.02)


def log_of(samples: list[tuple[Size, float]], depth: int = 1) -> Log:
    """A log with one request of one token for each of these iterations."""
    at = 0.0
    events: list = []
    for id, (of, seconds) in enumerate(samples):
        events.append(Arrived(at=at, id=id, prompt=of.tokens, max_tokens=1))
        at += 0.001
        events.append(Submitted(at, ((id, 0, of.tokens, True),)))
        at += seconds
        events.append(Returned(at=at, seconds=seconds))
    return Log(Header(config=config(depth)), tuple(events))


def test_a_fit_keeps_what_it_cannot_explain() -> None:
    rng = random.Random(1)
    cost = StageCost(fixed=0.01, per_token=0.001)
    samples = [(of := size_of([(0, rng.randint(1, 60), True)]), cost(of) * rng.uniform(0.8, 1.2)) for _ in range(800)]
    found = fit([log_of(samples)])
    assert found.residuals[0].above == 0 and len(found.residuals) > 1
    for band in found.residuals:
        assert min(band.factors) < 0.85 and max(band.factors) > 1.15
        assert statistics.mean(band.factors) == pytest.approx(1.0, abs=0.05)
    assert msgspec.json.decode(msgspec.json.encode(found), type=CostModel) == found
    assert turns_of(log_of(samples)) == [], "nobody was left between the iterations: what passed was a wait"


def test_too_little_to_fit_is_said() -> None:
    with pytest.raises(ValueError, match="3 iterations are too few"):
        fit([log_of([(size_of([(0, 5, True)]), 0.1)] * 3)])
    with pytest.raises(ValueError, match="depth 1"):
        fit([log_of([(size_of([(0, 5, True)]), 0.1)] * 50, depth=2)])


def test_costs_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="per_row is -1"):
        StageCost(per_row=-1)
    with pytest.raises(ValueError, match="at least one stage"):
        CostModel(stages=())
    with pytest.raises(ValueError, match="at 0 seconds or later"):
        Arrival(-1.0, 1, 1)
    with pytest.raises(ValueError, match="1 token or more"):
        Arrival(0.0, 0, 1)


@pytest.mark.parametrize(
    ("name", "kv"), [("13B", 819_200), ("101B", 3_276_800), ("175B", 4_718_592), ("341B", 7_372_800)]
)
def test_the_papers_models_have_its_kv_bytes(name: str, kv: int) -> None:
    assert SHAPES[name].kv_bytes_per_token == kv
    assert SHAPES[name].parameters == pytest.approx(float(name[:-1]) * 1e9, rel=0.05)


@given(st.sampled_from(sorted(HARDWARE)), st.sampled_from(sorted(SHAPES)), st.sampled_from([1, 2, 4, 8]), sizes)
def test_more_devices_are_never_slower_but_for_what_they_send(on: str, shape: str, tensor: int, of: Size) -> None:
    one, many = (derive(HARDWARE[on], SHAPES[shape], Parallel(count)).stages[0] for count in (1, tensor))
    hops = 2 * SHAPES[shape].layers * HARDWARE[on].hop * (tensor > 1)
    assert many(of) - many.per_token_sent * of.tokens <= one(of) + hops + 1e-12


def test_stages_share_the_layers_and_the_memory() -> None:
    assert equal_layers(SHAPES["175B"].layers, 5) == [20, 19, 19, 19, 19]
    assert len(derive(HARDWARE["A100-40GB"], SHAPES["341B"], Parallel(8, 4)).stages) == 4
    assert kv_tokens(HARDWARE["A100-40GB"], SHAPES["175B"], Parallel(8, 2)) > 20_000
    with pytest.raises(ValueError, match="does not fit 8 x A100-40GB"):
        kv_tokens(HARDWARE["A100-40GB"], SHAPES["341B"], Parallel(8, 1))
    with pytest.raises(ValueError, match="cannot be shared by 7"):
        derive(HARDWARE["H100"], SHAPES["13B"], Parallel(7))
    with pytest.raises(ValueError, match="no hardware is called 'abacus'; there are A100-40GB"):
        hardware("abacus")


def test_who_leaves_is_let_go_and_prefixes_are_found() -> None:
    prompt = tuple(range(64))
    arrivals = [
        Arrival(0.0, 64, 50, prompt),
        Arrival(1.0, 64, 50, prompt),
        Arrival(1.0, 32, 500, leaves=2.0),
    ]
    records, _ = simulate(arrivals, config(), CostModel(stages=(StageCost(fixed=0.05),)))
    assert [len(record.token_times) for record in records[:2]] == [50, 50]
    assert 0 < len(records[2].token_times) < 500
    assert records[0].num_cached == 0 and records[1].num_cached == 48
