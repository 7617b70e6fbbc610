"""What agent and control plane have in common: records, messages, errors and small ports."""
