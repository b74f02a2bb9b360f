"""Units over actors: same rows whoever does them, dead workers, failing groups, kept results."""

import numpy as np
import psutil
import pytest

from ray_platform.contracts import ConfigError
from ray_platform.evaluate.fan_out import FanOut, Fleet, Progress, in_order
from ray_platform.evaluate.result_cache import ResultCache, cache_key
from ray_platform.evaluate.schedule import MAX_DEATHS, Unit
from tests.ray_platform.evaluate.work_for_tests import DieOnce, Divide, Fail, Square, no_parts

pytestmark = pytest.mark.usefixtures("ray_cluster")


def unit(work, group="squares", cost=1.0, first=False):
    return Unit(f"unit {work}", group, cache_key({"work": repr(work)}), cost, work, first)


def squares(numbers, **fields):
    return [unit(Square(number, **fields)) for number in numbers]


def fan_out(folder, num_workers=2, shown=None):
    fleet = Fleet(no_parts, num_workers, cpus_per_worker=0.5)
    return FanOut(fleet, ResultCache(str(folder)), (shown if shown is not None else []).append)


def run(units, *arguments, **options):
    with fan_out(*arguments, **options) as workers:
        return list(workers.run(units))


def values(outcomes):
    return sorted(int(outcome.rows["squares"][0]) for outcome in outcomes if outcome.rows)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_unit_is_done_once_and_the_second_time_taken_from_what_was_kept(tmp_path, num_workers):
    notes = tmp_path / "notes"
    notes.mkdir()
    units = squares(range(12), notes=str(notes))
    for _ in range(2):
        assert values(run(units, tmp_path / "kept", num_workers)) == [n**2 for n in range(12)]
        assert len(list(notes.iterdir())) == 12


def test_a_cut_off_evaluation_goes_on_and_a_damaged_file_is_made_again(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    units = squares(range(6), notes=str(notes))
    with fan_out(tmp_path / "kept", 1) as workers:
        outcomes = workers.run(units)
        done = [next(outcomes), next(outcomes)]  # and then the block ends, as by an exception or Ctrl-C in the driver
    before = len(list(notes.iterdir()))
    assert 2 <= before < 6
    kept = tmp_path / "kept" / f"{done[0].unit.key}.npz"
    kept.write_bytes(kept.read_bytes()[:50])
    assert values(run(units, tmp_path / "kept")) == [0, 1, 4, 9, 16, 25]
    again = [int(note.name.partition("-")[0]) for note in notes.iterdir()]
    assert again.count(done[0].unit.work.number) == 2
    assert again.count(done[1].unit.work.number) == 1


def test_workers_stay_for_the_next_run_and_end_with_the_block(tmp_path):
    (tmp_path / "notes").mkdir()

    def processes(numbers):
        list(workers.run(squares(numbers, notes=str(tmp_path / "notes"), seconds=0.2)))
        notes = [note.name.split("-") for note in (tmp_path / "notes").iterdir()]
        return {int(process) for number, process, _ in notes if int(number) in numbers}

    with fan_out(tmp_path / "kept", 2) as workers:
        first = processes(range(1))
        assert len(first) == 1, "no more workers than units"
        second = processes(range(1, 9))
        assert len(second) == 2
        assert first < second
        found = [psutil.Process(process) for process in second]
    assert not psutil.wait_procs(found, timeout=20)[1]


def test_a_killed_worker_is_replaced_and_nothing_is_lost(tmp_path):
    shown = []
    units = [*squares(range(8)), unit(DieOnce(8, str(tmp_path))), unit(DieOnce(9, str(tmp_path), times=2))]
    assert values(run(units, tmp_path / "kept", shown=shown)) == [n**2 for n in range(10)]
    assert "workers lost" in shown[-1]


def test_a_unit_that_kills_every_worker_fails_its_group_and_no_other(tmp_path):
    deadly = unit(DieOnce(1, str(tmp_path), times=99), group="deadly")
    found = run([deadly, *squares(range(4))], tmp_path / "kept", 1)
    assert values(found) == [0, 1, 4, 9]
    (error,) = [outcome.error for outcome in found if outcome.error]
    assert error.startswith(f"{deadly.name}: {MAX_DEATHS} workers died with it, the last time so: ")


def test_an_error_is_one_line_and_leaves_out_the_rest_of_its_group(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    bad = unit(Fail("cars: label 200 is out of range"), group="cars", cost=9.0)
    rest = [unit(Square(n, str(notes)), group="cars") for n in range(50, 90)]
    broken = unit(Divide(), group="broken", cost=9.0)
    found = run([*rest, bad, broken, *squares(range(3))], tmp_path / "kept", 1)
    errors = {outcome.unit.group: outcome.error for outcome in found if outcome.error}
    assert errors["cars"] == "cars: label 200 is out of range"
    assert errors["broken"] == f"{broken.name}: ZeroDivisionError: integer division or modulo by zero"
    assert {0, 1, 4} <= set(values(found))
    assert len(list(notes.iterdir())) < 5, "what was not yet begun is left out"


def test_units_that_others_wait_for_come_first_and_then_the_dearest(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    dear, cheap = unit(Square(1, str(notes), 0.3), cost=5.0), unit(Square(2, str(notes)), cost=1.0)
    first = unit(Square(3, str(notes), 0.3), cost=0.5, first=True)
    run([cheap, dear, first], tmp_path / "kept", 1)
    order = sorted((int(note.name.rsplit("-", 1)[1]), int(note.name.partition("-")[0])) for note in notes.iterdir())
    assert [number for _, number in order][2] == 2
    assert {number for _, number in order[:2]} == {1, 3}


def test_a_fleet_that_does_not_fit_says_so(tmp_path):
    with pytest.raises(ConfigError) as error:
        list(FanOut(Fleet(no_parts, 9, cpus_per_worker=1.0), ResultCache(str(tmp_path)), print).run(squares(range(3))))
    assert str(error.value) == (
        "num_workers: 9 with 1 CPUs and 0 GPUs each do not fit the cluster's 4 CPUs and 0 GPUs; lower num_workers, "
        "cpus_per_worker or gpus_per_worker"
    )
    with pytest.raises(ConfigError, match=r"num_workers: 1 with 1 CPUs and 0\.5 GPUs each do not fit"):
        Fleet(no_parts, gpus_per_worker=0.5).size()


def test_rows_are_joined_by_place_and_a_unit_without_rows_adds_none():
    parts = {2: {"x": np.array([[5.0, 6.0]]), "y": np.array([3])}, 0: {"x": np.array([[1.0, 2.0]])}, 1: {"y": np.array([2])}}
    joined = in_order(parts)
    assert joined["x"].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert joined["y"].tolist() == [2, 3]
    assert in_order({0: {"x": np.array([])}})["x"].shape == (0,)


def test_the_bar_counts_what_was_kept_as_done_but_not_as_speed():
    progress = Progress(10.0, 4)
    progress.add(unit(Square(1), cost=4.0), kept=True)
    assert progress.line().startswith("1/4 units  [########            ]  40%  left 0:00")
    progress.begun -= 60
    progress.add(unit(Square(2), cost=2.0), kept=False)
    assert progress.line() == "2/4 units  [############        ]  60%  left 2:00"
