"""Servers of the OpenAI API: whether they compute the model that they say, and what faults do."""
