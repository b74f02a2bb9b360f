"""DiffDis as an MLflow model."""
