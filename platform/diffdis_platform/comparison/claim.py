"""The paper's claim about the joint model, which a comparison tests."""

from ray_platform.report.records import Claim

CLAIM = Claim(
    differences=(("accuracy", "joint", "alignment"), ("fd", "joint", "generation")),
    holds="The claim holds: the joint model is better than the single-task models at both tasks",
    opposite="The claim does not hold: the joint model is worse at one of the tasks, or at both",
    not_shown="Null result: the claim is not shown",
    undecided="No verdict: the claim is about two differences, each over several seeds",
)
