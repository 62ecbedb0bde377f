"""How many connections a process may have open."""

from __future__ import annotations

import resource

SPARE_DESCRIPTORS = 128  # for all that is no connection


def make_room(num_connections: int) -> int:
    """Raise this process's limit of open files for so many connections; returns how many the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return num_connections
    needed = num_connections + SPARE_DESCRIPTORS
    limit = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, min(num_connections, limit - SPARE_DESCRIPTORS))
