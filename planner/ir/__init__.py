"""Values that planner and runtime share: tensors, operators, graphs, splits, layouts, meshes."""
