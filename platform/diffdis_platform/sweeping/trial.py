"""What a trial does in each of its segments: the same pretraining and evaluation as jobs/pretrain.py and jobs/eval.py."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.evaluation.headline import headline
from diffdis_platform.evaluation.run import evaluate, plan
from diffdis_platform.sweeping.fields import configure
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.trial import Reached, Segment
from ray_platform.tracking import RUN_RECORD, RunRecord, TrackingConfig, start_run
from ray_platform.train import checkpoint_format


@dataclass(frozen=True)
class TrialJob:
    """See `ray_platform.sweep.trial.Job`."""

    config: SweepConfig
    recipe: str
    tracked: RunRecord  # of the sweep

    def train(self, segment: Segment) -> Reached:
        self._take_run_over(segment)
        self.pretrain(segment).run(self.recipe).fit()
        url = checkpoint_format.list_checkpoints(segment.folder)[0]
        manifest = checkpoint_format.read_manifest(url)
        return Reached(url, manifest.step, manifest.samples_seen)

    def evaluate(self, segment: Segment, reached: Reached) -> dict[str, float]:
        """Raises DataError where not all was measured."""
        config = self._evaluation(segment, reached)
        details = evaluate(config, plan(config))
        if details["failures"]:
            raise DataError("not all was measured: " + "; ".join(details["failures"]))
        found = headline(details)
        metrics = metrics_for_tracking(details) | found
        if missing := [metric for metric in self.config.objectives if metric not in metrics]:
            raise DataError(f"objectives: {missing[0]} was not measured; there are {', '.join(sorted(metrics))}")
        self._keep_reference(segment, config)
        self._track(segment, reached, found)
        return metrics

    def pretrain(self, segment: Segment) -> PretrainConfig:
        pretrain, _ = configure(self.config, segment.values)
        train, num_steps = pretrain.train, steps(pretrain, self.config.samples)
        keep = train.keep_checkpoints
        if self.config.scheduler == "pbt":  # others may take over any that was made at a milestone
            keep = self.config.num_milestones + num_steps // train.checkpoint_every
        return replace(
            pretrain,
            output_dir=segment.folder,
            train=replace(
                train,
                num_steps=num_steps,
                stop_at_step=max(1, round(num_steps * segment.share)),
                keep_checkpoints=keep,
                resume="auto" if checkpoint_format.list_checkpoints(segment.folder) else segment.origin or "auto",
            ),
            tracking=self._tracking(segment),
        )

    def _tracking(self, segment: Segment) -> TrackingConfig:
        return TrackingConfig(
            self.tracked["tracking_uri"],
            self.tracked["experiment"],
            segment.trial,
            self.tracked["run_id"],
            backends=self.config.tracking.backends,
        )

    def _take_run_over(self, segment: Segment) -> None:
        """A trial has one MLflow run, also where it began anew in another folder."""
        url = storage.join(segment.folder, RUN_RECORD)
        if storage.exists(url):
            return
        pattern = storage.join(self.config.output_dir, "trials", f"{segment.trial}_*", RUN_RECORD)
        found = storage.list_files(pattern) if storage.exists(storage.join(self.config.output_dir, "trials")) else ()
        if found:
            storage.write_bytes(url, storage.read_bytes(found[0].url))

    def _evaluation(self, segment: Segment, reached: Reached) -> EvalConfig:
        pretrain, given = configure(self.config, segment.values)
        quality, shared = given.quality, self._reference(pretrain, given)
        if quality.prompts and shared and storage.exists(shared):
            quality = replace(quality, reference=shared)
        return replace(
            given,
            checkpoint=storage.join(segment.folder, "export"),
            output_dir=storage.join(segment.folder, "evaluations", checkpoint_format.checkpoint_name(reached.step)),
            quality=quality,
            tracking=self._tracking(segment),
            num_workers=evaluation_workers(self.config),
        )

    def _reference(self, pretrain: PretrainConfig, config: EvalConfig) -> str:
        """Features of the real images, which the first evaluation leaves to the others. Empty: there are several networks."""
        networks = config.quality.networks
        name = f"reference_{networks[0]}_{pretrain.model.image_size}px.npz"
        return storage.join(self.config.output_dir, name) if len(networks) == 1 else ""

    def _keep_reference(self, segment: Segment, config: EvalConfig) -> None:
        shared = self._reference(configure(self.config, segment.values)[0], config)
        own = storage.join(config.output_dir, f"reference_{config.quality.networks[0]}.npz")
        if shared and not storage.exists(shared) and storage.exists(own):
            storage.write_bytes(shared, storage.read_bytes(own))

    def _track(self, segment: Segment, reached: Reached, metrics: Mapping[str, float]) -> None:
        """By names that all trials share, whatever their guidance scale, so that MLflow can compare them."""
        run = storage.read_json(storage.join(segment.folder, RUN_RECORD))
        with start_run(self._tracking(segment), segment.folder, run_id=run["run_id"]) as tracker:
            tracker.log_metrics({f"sweep/{name}": value for name, value in metrics.items()}, reached.step)


def steps(pretrain: PretrainConfig, samples: int) -> int:
    """Raises ConfigError for fewer samples than a step takes."""
    train = pretrain.train
    batch = train.global_batch_size or train.max_workers * train.micro_batch_size
    if samples < batch:
        raise ConfigError(f"samples: {samples} is less than a step's {batch}")
    return samples // batch


def evaluation_workers(config: SweepConfig) -> int:
    """As given, else as many as have room where a trial's training workers were."""
    given, trainers = config.evaluation, training_needs(config.pretrain)[0].amounts
    if given.num_workers:
        return given.num_workers
    shares = [(trainers["CPU"], given.cpus_per_worker), (trainers["GPU"], given.gpus_per_worker)]
    return max(1, min(int(there / share + 1e-6) for there, share in shares if share))


def training_needs(pretrain: PretrainConfig) -> list[ResourceRequest]:
    """Of a trial's workers, and of their reads where those have other nodes."""
    train, data = pretrain.train, pretrain.data
    cpus, gpus = train.max_workers * train.cpus_per_worker, float(train.max_workers * train.gpus_per_worker)
    reads = train.max_workers * data.reads_per_rank * data.cpus_per_read
    if data.placement == train.placement:
        return [ResourceRequest(train.placement, {"CPU": cpus + reads, "GPU": gpus})]
    return [ResourceRequest(train.placement, {"CPU": cpus, "GPU": gpus}), ResourceRequest(data.placement, {"CPU": reads})]


def needs(config: SweepConfig) -> list[ResourceRequest]:
    """What a trial takes of the cluster: trains, or evaluates."""
    given, workers = config.evaluation, evaluation_workers(config)
    evaluating = ResourceRequest(
        given.placement, {"CPU": workers * given.cpus_per_worker, "GPU": workers * given.gpus_per_worker}
    )
    most: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for need in (*training_needs(config.pretrain), evaluating):
        amounts = most.setdefault(tuple(sorted(need.labels.items())), {})
        amounts |= {kind: max(amount, amounts.get(kind, 0.0)) for kind, amount in need.amounts.items()}
    return [ResourceRequest(dict(labels), amounts) for labels, amounts in most.items()]
