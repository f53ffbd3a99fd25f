"""What is particular to Ray: the session, file systems, failures, elastic groups, maps over a cluster, patches."""
