"""Write the table of docs/safety.md anew: `PYTHONPATH=platform:. python -m tests.safety.write_table`."""

from tests.safety.test_hostile import BEGIN, DOCS, END, table

if __name__ == "__main__":
    head, _, rest = DOCS.read_text().partition(BEGIN)
    DOCS.write_text(head + BEGIN + table() + END + rest.partition(END)[2])
