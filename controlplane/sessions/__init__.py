"""The agents' two RPCs on a replica: sessions with the leader, telemetry with any."""
