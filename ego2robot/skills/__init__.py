"""Skill discovery: k-means on a run's embeddings, with names, quality figures and projections."""

from ego2robot.skills.cluster import cluster

__all__ = ["cluster"]
