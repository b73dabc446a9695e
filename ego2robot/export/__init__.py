"""Chosen clips to formats that robot-learning code reads. Adding one is a module here."""
