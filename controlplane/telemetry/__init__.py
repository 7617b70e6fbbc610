"""What is measured: the last ten minutes of every node and VM, and the metrics of a replica."""
