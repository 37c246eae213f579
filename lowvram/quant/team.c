// Work shared among the threads that torch computes with: what all C sources of this folder begin with.

#include <stdint.h>

// Functions of the OpenMP that torch has loaded, as GCC's libgomp documents them. Another one's threads would have to
// share the processor with torch's, which wait for their next work in a loop.
typedef struct {
    void (*parallel)(void (*work)(void *), void *shared, unsigned threads, unsigned flags);
    int (*thread)(void), (*size)(void);
} Team;

// Does the pieces from `first` to before `last`.
typedef void (*Work)(const void *task, int64_t first, int64_t last);

typedef struct {
    const Team *team;
    Work work;
    const void *task;
    int64_t pieces;
} Shares;

// The part of one of a team's threads.
static void work_share(void *shared) {
    const Shares *s = shared;
    const int64_t n = s->team->size(), thread = s->team->thread();
    s->work(s->task, s->pieces * thread / n, s->pieces * (thread + 1) / n);
}

static void share_out(const Team *team, unsigned threads, Work work, const void *task, int64_t pieces) {
    Shares shares = {team, work, task, pieces};
    if (threads > 1)
        team->parallel(work_share, &shares, threads, 0);
    else
        work(task, 0, pieces);
}

