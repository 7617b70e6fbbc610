"""etcd and what is built on it: client, watch, informer, applier, history."""
