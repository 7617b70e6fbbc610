"""Use cases: authorize, validate, plan, commit. No HTTP and no gRPC here."""
