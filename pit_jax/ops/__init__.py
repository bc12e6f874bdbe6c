"""Pure functions of arrays: attention, masks, positions, norms, segments and the language-model head."""
