"""The daemon on each node: reports what is, makes desired VMs so, never decides placement."""
