"""A step beside other ways to write it: the contestants and the contest."""
