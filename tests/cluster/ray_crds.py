"""Strict JSON schemas of KubeRay's resources, derived from the types of its API (ray.io/v1, release 1.6).

KubeRay's CRDs take a megabyte and no package contains them. Kubernetes' schemas check the pod templates.
"""

TEXT, NUMBER, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
LEFT = {"type": "object"}  # checked by Kubernetes' schemas instead


def _record(required=(), **fields):
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


_GROUP = {"labels": TEXTS, "resources": TEXTS, "rayStartParams": TEXTS, "template": LEFT}

CLUSTER_SPEC = _record(
    ["headGroupSpec"],
    authOptions=_record(mode={"enum": ["disabled", "token"]}, enableK8sTokenAuth=SWITCH, secretName=TEXT),
    autoscalerOptions=_record(
        env={"type": "array"}, envFrom={"type": "array"}, idleTimeoutSeconds=NUMBER, image=TEXT, imagePullPolicy=TEXT,
        resources=LEFT, securityContext=LEFT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]}, volumeMounts={"type": "array"},
    ),
    enableInTreeAutoscaling=SWITCH,
    gcsFaultToleranceOptions=LEFT,
    headGroupSpec=_record(["template"], **_GROUP, enableIngress=SWITCH, headService=LEFT, serviceType={"enum": ["ClusterIP"]}),
    headServiceAnnotations=TEXTS,
    managedBy=TEXT,
    rayVersion=TEXT,
    suspend=SWITCH,
    workerGroupSpecs={
        "type": "array",
        "items": _record(
            ["groupName", "minReplicas", "maxReplicas", "template"], **_GROUP, groupName=TEXT, idleTimeoutSeconds=NUMBER,
            maxReplicas=NUMBER, minReplicas=NUMBER, numOfHosts=NUMBER, replicas=NUMBER, scaleStrategy=LEFT, suspend=SWITCH,
        ),
    },
)  # fmt: skip

JOB_SPEC = _record(
    ["entrypoint"],
    activeDeadlineSeconds=NUMBER, backoffLimit=NUMBER, clusterSelector=TEXTS, deletionStrategy=LEFT, entrypoint=TEXT,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, entrypointResources=TEXT, jobId=TEXT,
    managedBy=TEXT, metadata=TEXTS, rayClusterSpec=CLUSTER_SPEC, runtimeEnvYAML=TEXT, shutdownAfterJobFinishes=SWITCH,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, submitterConfig=LEFT,
    submitterPodTemplate=LEFT, suspend=SWITCH, ttlSecondsAfterFinished=NUMBER,
)  # fmt: skip


def whole(spec):
    return _record(["metadata", "spec"], apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=LEFT, spec=spec)


SCHEMAS = {"RayCluster": whole(CLUSTER_SPEC), "RayJob": whole(JOB_SPEC)}
