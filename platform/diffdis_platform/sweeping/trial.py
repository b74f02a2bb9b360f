"""A segment of a trial: the pretraining and evaluation of jobs/pretrain.py and jobs/eval.py, up to the next milestone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.evaluation.headline import headline
from diffdis_platform.evaluation.run import evaluate, plan_evaluation
from diffdis_platform.sweeping.fields import configure
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.trial import SegmentResult, TrialSegment
from ray_platform.tracking import RUN_RECORD, TrackingConfig, read_run_record, start_run
from ray_platform.train import checkpoint_format


@dataclass(frozen=True)
class TrialRunner:
    """Trains and evaluates one segment of a trial (a `ray_platform.sweep.trial.RunSegment`)."""

    config: SweepConfig
    recipe: str
    tracking: TrackingConfig  # of the trials, below the sweep's run

    def __call__(self, segment: TrialSegment) -> SegmentResult:
        """Train to the end of the segment and evaluate. Raises DataError if an objective was not measured."""
        self._adopt_tracked_run(segment)
        self.pretrain_config(segment).run(self.recipe).fit()
        url = checkpoint_format.list_checkpoints(segment.folder)[0]
        manifest = checkpoint_format.read_manifest(url)
        metrics = self._evaluate(segment, manifest.step)
        return SegmentResult(url, manifest.step, manifest.samples_seen, metrics)

    def pretrain_config(self, segment: TrialSegment) -> PretrainConfig:
        """Return the config that trains to the end of the segment. The learning rate schedule spans the complete budget."""
        pretrain, _ = configure(self.config, segment.values)
        train, num_steps = pretrain.train, training_steps(pretrain, self.config.samples)
        keep = train.keep_checkpoints
        if self.config.scheduler == "pbt":  # other trials may clone the checkpoint of any milestone
            keep = self.config.num_milestones + num_steps // train.checkpoint_every
        return replace(
            pretrain,
            output_dir=segment.folder,
            train=replace(
                train,
                num_steps=num_steps,
                stop_at_step=max(1, round(num_steps * segment.budget_fraction)),
                keep_checkpoints=keep,
                resume="auto" if checkpoint_format.list_checkpoints(segment.folder) else segment.origin or "auto",
            ),
            tracking=replace(self.tracking, run_name=segment.trial),
        )

    def _evaluate(self, segment: TrialSegment, step: int) -> Mapping[str, float]:
        config = self._evaluation_config(segment, step)
        details = evaluate(config, plan_evaluation(config))
        if details["failures"]:
            raise DataError("not everything was measured: " + "; ".join(details["failures"]))
        main_metrics = headline(details)
        metrics = metrics_for_tracking(details) | main_metrics
        if missing := [metric for metric in self.config.objectives if metric not in metrics]:
            raise DataError(f"objectives: {missing[0]} was not measured; use one of {', '.join(sorted(metrics))}")
        self._share_reference(segment, config)
        # Under names that are equal for all trials, whatever their guidance scale, so that MLflow can compare them.
        if run := read_run_record(segment.folder):
            with start_run(config.tracking, segment.folder, run_id=run["run_id"]) as tracker:
                tracker.log_metrics({f"sweep/{name}": value for name, value in main_metrics.items()}, step)
        return metrics

    def _evaluation_config(self, segment: TrialSegment, step: int) -> EvalConfig:
        pretrain, evaluation = configure(self.config, segment.values)
        quality, reference = evaluation.quality, self._shared_reference(pretrain, evaluation)
        if quality.prompts and reference and storage.exists(reference):
            quality = replace(quality, reference=reference)
        return replace(
            evaluation,
            checkpoint=storage.join(segment.folder, "export"),
            output_dir=storage.join(segment.folder, "evaluations", checkpoint_format.checkpoint_name(step)),
            quality=quality,
            tracking=replace(self.tracking, run_name=segment.trial),
            num_workers=evaluation_workers(self.config),
        )

    def _adopt_tracked_run(self, segment: TrialSegment) -> None:
        """Keep the trial's MLflow run when the trial, as a clone, starts in another folder."""
        url, trials = storage.join(segment.folder, RUN_RECORD), storage.join(self.config.output_dir, "trials")
        if storage.exists(url) or not storage.exists(trials):
            return
        if earlier := storage.list_files(storage.join(trials, f"{segment.trial}_*", RUN_RECORD)):
            storage.write_bytes(url, storage.read_bytes(earlier[0].url))

    def _shared_reference(self, pretrain: PretrainConfig, config: EvalConfig) -> str:
        """Return the URL of the real images' features that all trials share; empty with several feature networks."""
        networks = config.quality.networks
        name = f"reference_{networks[0]}_{pretrain.model.image_size}px.npz"
        return storage.join(self.config.output_dir, name) if len(networks) == 1 else ""

    def _share_reference(self, segment: TrialSegment, config: EvalConfig) -> None:
        """Copy the features of the real images from the first evaluation for the others."""
        shared = self._shared_reference(configure(self.config, segment.values)[0], config)
        computed = storage.join(config.output_dir, f"reference_{config.quality.networks[0]}.npz")
        if shared and not storage.exists(shared) and storage.exists(computed):
            storage.write_bytes(shared, storage.read_bytes(computed))


def training_steps(pretrain: PretrainConfig, samples: int) -> int:
    """Return the number of steps for a budget of samples. Raises ConfigError if it is smaller than a batch."""
    train = pretrain.train
    batch = train.global_batch_size or train.max_workers * train.micro_batch_size
    if samples < batch:
        raise ConfigError(f"samples: {samples} is less than a step's {batch}; use at least {batch}")
    return samples // batch


def evaluation_workers(config: SweepConfig) -> int:
    """Return evaluation.num_workers; if it is 0, as many as fit the resources of the training workers."""
    evaluation, training = config.evaluation, _training_resources(config.pretrain)[0].amounts
    if evaluation.num_workers:
        return evaluation.num_workers
    needs = [(training["CPU"], evaluation.cpus_per_worker), (training["GPU"], evaluation.gpus_per_worker)]
    return max(1, min(int(available / need + 1e-6) for available, need in needs if need))


def trial_resources(config: SweepConfig) -> list[ResourceRequest]:
    """Return the resources of a trial, one request per group of nodes: the larger of what training and evaluation need."""
    evaluation, workers = config.evaluation, evaluation_workers(config)
    amounts = {"CPU": workers * evaluation.cpus_per_worker, "GPU": workers * evaluation.gpus_per_worker}
    largest: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for need in (*_training_resources(config.pretrain), ResourceRequest(evaluation.placement, amounts)):
        group = largest.setdefault(tuple(sorted(need.labels.items())), {})
        group |= {kind: max(amount, group.get(kind, 0.0)) for kind, amount in need.amounts.items()}
    return [ResourceRequest(dict(labels), group) for labels, group in largest.items()]


def _training_resources(pretrain: PretrainConfig) -> list[ResourceRequest]:
    """Return what the workers need, and what their reads need if those run on other nodes."""
    train, data = pretrain.train, pretrain.data
    cpus, gpus = train.max_workers * train.cpus_per_worker, float(train.max_workers * train.gpus_per_worker)
    reads = train.max_workers * data.reads_per_rank * data.cpus_per_read
    if data.placement == train.placement:
        return [ResourceRequest(train.placement, {"CPU": cpus + reads, "GPU": gpus})]
    return [ResourceRequest(train.placement, {"CPU": cpus, "GPU": gpus}), ResourceRequest(data.placement, {"CPU": reads})]
