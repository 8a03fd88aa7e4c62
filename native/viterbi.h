// Encoder of the trellis code; see viterbi.cpp.
#pragma once
#include "viterbi_kernel.h"

namespace septet {

// Owns the search tables of one width. window_levels: int8 [65536][2], the two levels of every window.
class WidthTables {
public:
    WidthTables(int bits, const int8_t* window_levels);
    ~WidthTables();
    WidthTables(const WidthTables&) = delete;
    WidthTables& operator=(const WidthTables&) = delete;
    const ViterbiTables& tables() const { return tables_; }

private:
    int32_t* levels_;
    ViterbiTables tables_;
};

// fixed: int16 [tiles][256] quarter levels within +-1020, in stream order. symbols: uint8 [tiles][128]. One thread; callers split the tiles.
void viterbi_encode(const ViterbiTables& tables, const ViterbiKernel& kernel, const int16_t* fixed, int64_t tiles, uint8_t* symbols);

}  // namespace septet
