"""DeepSpeed configurations, usable unchanged by plain DeepSpeed; `pipeline.engine` overlays what a recipe owns."""
