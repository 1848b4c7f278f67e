/* draw BUNDLE PROGRAM PROMPT OUT.ppm [SEED]: one image in C11. */
#include <driffusion.h>
#include <stdio.h>
#include <stdlib.h>

static int failed(const char *what) {
    fprintf(stderr, "error: %s: %s\n", what, driffusion_last_error());
    return 1;
}

static int progress(void *user, uint32_t finished, uint32_t steps) {
    (void)user;
    fprintf(stderr, "\r%u of %u steps", finished, steps);
    return 0; /* anything else cancels */
}

int main(int argc, char **argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s BUNDLE PROGRAM PROMPT OUT.ppm [SEED]\n", argv[0]);
        return 2;
    }
    driffusion_open_info info = DRIFFUSION_OPEN_INIT;
    info.bundle = argv[1];
    info.program = argv[2];
    driffusion_engine engine;
    if (driffusion_open(&info, &engine) != DRIFFUSION_OK) return failed(argv[1]);

    int code = 1;
    driffusion_sizes_info sizes = DRIFFUSION_SIZES_INIT;
    driffusion_call call = DRIFFUSION_CALL_INIT;
    driffusion_result result = DRIFFUSION_RESULT_INIT;
    uint8_t *rgb = NULL;
    FILE *file = NULL;
    if (driffusion_sizes(engine, 1, &sizes) != DRIFFUSION_OK) {
        failed("sizes");
        goto close;
    }
    rgb = malloc(sizes.rgb_bytes);
    call.prompt = argv[3];
    call.seed = argc > 5 ? strtoull(argv[5], NULL, 10) : 0;
    call.rgb = rgb;
    call.rgb_bytes = rgb ? sizes.rgb_bytes : 0;
    call.progress = progress;
    if (driffusion_generate(engine, &call, &result) != DRIFFUSION_OK) {
        failed("no image");
        goto close;
    }
    file = fopen(argv[4], "wb");
    if (!file) {
        perror(argv[4]);
        goto close;
    }
    fprintf(file, "P6\n%u %u\n255\n", sizes.width, sizes.height);
    fwrite(rgb, 1, sizes.rgb_bytes, file);
    if (fclose(file) != 0) {
        perror(argv[4]);
        goto close;
    }
    fprintf(stderr, "\n%s: %u rounds, %.3f s\n", argv[4], result.rounds, result.total_seconds);
    code = 0;
close:
    free(rgb);
    driffusion_close(engine);
    return code;
}
