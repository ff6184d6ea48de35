"""What every stage stands on: recipe, chain, checkpoint handoff, DeepSpeed engine, models, data, tracking."""
