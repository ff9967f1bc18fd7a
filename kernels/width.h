/* For libraries that have functions for vectors of either length: which of them is taken. */

#ifndef LORAPLEX_WIDTH_H
#define LORAPLEX_WIDTH_H

#include "floats.h"

int loraplex_broad = -1; /* whether vectors are broad: -1 not asked yet */

static int takes_broad(void) {
    if (loraplex_broad < 0) loraplex_broad = has_broad();
    return loraplex_broad;
}

#if HAS_BROAD
#define BY_WIDTH(function) (takes_broad() ? function##_Broad : function##_Lanes)
#else
#define BY_WIDTH(function) function##_Lanes
#endif

#endif
