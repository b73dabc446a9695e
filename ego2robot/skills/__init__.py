"""Skill discovery: k-means on a run's embeddings, with names, quality figures and projections."""

from ego2robot.skills.assignment import Shard
from ego2robot.skills.cluster import cluster, cluster_shard

__all__ = ["Shard", "cluster", "cluster_shard"]
