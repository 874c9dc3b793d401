"""The machine: memory, vCPUs, execution, text poking, ftrace, trampolines, tasks and module loading."""
