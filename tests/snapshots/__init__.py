"""What gprune gives today: rows without records, numbers of three lists, and settings of all documented commands.

`python -m tests.snapshots` writes the files of `stored/` again. Do so in the commit that changes an output on purpose,
and read the difference.
"""
