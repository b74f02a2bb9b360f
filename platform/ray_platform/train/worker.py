"""The training function as Ray Train is given it."""

from ray_platform.train.job import Job


def work(job: Job) -> None:
    """Ray Train's controller unpickles this, too: what trains, whose imports take seconds, is imported by the workers alone."""
    from ray_platform.train.loop import train_worker

    train_worker(job)
