"""The driver's side of jobs/eval.py: what is measured, on which units of work, and what comes out. Joins the two libraries."""
