"""A real cluster on one machine: nodes in namespaces of their own, etcd, replicas, the demo."""
