/* Calls of kernels one after another, for callers that would take longer to make each than it runs. */

#include <stdint.h>

#define WORDS 8

/* Integers and addresses travel in the same registers or places of the stack, whatever their types: a kernel finds its
   arguments among words, and what follows them is not looked at. */
typedef struct {
    void (*kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
    int64_t words[WORDS];
} Call;

void loraplex_make_calls(const Call *calls, int64_t num_calls) {
    for (const Call *c = calls; c < calls + num_calls; c++) {
        const int64_t *w = c->words;
        c->kernel(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]);
    }
}
