from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_platform_is_no_package():
    """With an __init__.py it would shadow the standard library's module, and `import uuid` would fail."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "jobs" / "__init__.py").exists()


def test_no_job_shadows_a_module():
    import sys

    assert not {path.stem for path in (ROOT / "jobs").glob("*.py")} & sys.stdlib_module_names
