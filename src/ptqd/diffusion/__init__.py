"""Everything that knows diffusers: running, recording and replaying pipelines, their parts, schedules and cost."""
