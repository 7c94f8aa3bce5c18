// Experts, of which a token meets ACTIVE. Their scores are made beside gate and up; each workgroup chooses
// by itself.

shared float parts[ACTIVE > 0 ? ACTIVE : 1];  // of the experts' outputs in their sum

// The router's part of the workgroup, whose weights are on their way.
void score_experts() {
    if (kept.group < kept.groups) {
        NORMED(y, first_gains)
        hold_floats(y);
        barrier();
        multiply_kept(ROUTE);
    }
}

void choose_experts() {
    for (uint i = lane; i < 4 * SCORE_QUADS; i += LANES) {
        uint score = i < COUNT ? EMPTY : 0;
        for (uint looks = 0; score == EMPTY && !gives_up(looks); looks++) {
            score = Messages(copy_at).at[BESIDE_AT + i];
        }
        know_score(i, uintBitsToFloat(score));
    }
    pick_known();
}

// Of those that were chosen, for who waits for their outputs.
void share_experts() {
    if (lane < ACTIVE) {
        parts[lane] = share_of(lane, Floats(entry[entry_at + ROUTER_AT + 1]));
    }
}
