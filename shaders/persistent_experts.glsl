// Experts, of which a token meets ACTIVE. Their scores are made beside gate and up; each workgroup chooses
// by itself.

// The router's part of the workgroup, whose weights are on their way.
void score_experts() {
    if (kept.group < kept.groups) {
        hold_norm(Quads(entry[entry_at + EXPERT_GAINS_AT]), true);
        multiply_kept(ROUTE);
    }
}

// What is on its way behind gate and up is of no expert that is chosen: it is asked for anew.
void choose_experts() {
    hold_norm(Quads(entry[entry_at + EXPERT_GAINS_AT + 1]), false);
    for (uint i = lane; i < COUNT; i += LANES) {
        uint score = EMPTY;
        for (uint looks = 0; score == EMPTY && !gives_up(looks); looks++) {
            score = Messages(copy_at).at[BESIDE_AT + i];
        }
        known[i] = uintBitsToFloat(score);
    }
    pick_known();
    if (lane < ACTIVE) {
        parts[lane] = share_of(lane, Floats(entry[entry_at + ROUTER_AT + 1]));
    }
    enter_group();
    ask_steps();
    EACH_TILE(FETCH)
}
