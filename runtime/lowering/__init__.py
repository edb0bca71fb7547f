"""From a traced model and a plan to the modules of one rank."""
