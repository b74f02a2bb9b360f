"""What was measured, on two shared CPU cores without an accelerator; LOG.md and the benchmark named say how."""

# tests/benchmarks/loader.py: JPEGs of 39 kB, 384 to 512 px, to 256 px, decoder `exact`, both cores.
_STREAM_IMAGES_PER_CORE = 1654 / 2
_DECODER_IMAGES_PER_CORE = 2228 / 2
_LOADER_PX, _LOADER_TARGET = (384 + 512) / 2, 256
# tests/benchmarks/sizing.py: milliseconds of CPU of the decoder = a + b * megapixels of the file, whatever the target's size.
_DECODE_MS = (0.27, 3.63)
# tests/benchmarks/loader.py: precomputed samples of 128 kB, both cores.
_PRECOMPUTED_BYTES_PER_CORE = 10_500 / 2 * 128e3
# tests/benchmarks/s3_reads.py, pyarrow.
_S3_READ_CPU_SECONDS_A_BYTE = 1.2e-9
# tests/benchmarks/sizing.py: one writer's core is busy for 2.45 s a gigabyte.
UPLOAD_BYTES_PER_SECOND = 1e9 / 2.45
# tests/benchmarks/faults.py: from the end of a worker or node until training goes on, median of 20.
RECOVERY_SECONDS = 51.0


def _decoder_ms(file_px: float) -> float:
    a, b = _DECODE_MS
    return a + b * (file_px / 1000) ** 2


def live_core_seconds(file_px: int, target_px: int, file_bytes: float) -> float:
    """Of reading a pair from S3 and decoding it: the stream's, with the decoder's part in proportion to the benchmark's fit, and
    the rest (tar, copies) to the target's pixels."""
    decoder = _decoder_ms(file_px) / _decoder_ms(_LOADER_PX) / _DECODER_IMAGES_PER_CORE
    rest = (1 / _STREAM_IMAGES_PER_CORE - 1 / _DECODER_IMAGES_PER_CORE) * (target_px / _LOADER_TARGET) ** 2
    return decoder + rest + file_bytes * _S3_READ_CPU_SECONDS_A_BYTE


def precomputed_core_seconds(row_bytes: float) -> float:
    """Of reading a precomputed sample from S3."""
    return row_bytes * (1 / _PRECOMPUTED_BYTES_PER_CORE + _S3_READ_CPU_SECONDS_A_BYTE)
