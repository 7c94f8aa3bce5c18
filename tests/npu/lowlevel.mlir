// A design without object FIFOs: DMA programs, locks, streams, packets, a cascade, and a sequence
// that mixes transfers, tasks and plain register writes. Core (0, 2) adds two streams from the
// mem tile; its result leaves through (1, 2), which receives it over the cascade.
module {
  aie.device(npu1) @main {
    memref.global "public" @host_in : memref<256xi32>
    memref.global "private" constant @words : memref<8xi32> = dense<[2, 0, 0x40090000, 0, -1, 0, 0, 7]>
    func.func private @add(memref<64xi32>, memref<64xi32, 2 : i32>) attributes {link_with = "add.o"}

    %shim = aie.tile(0, 0) {controller_id = #aie.packet_info<pkt_type = 0, pkt_id = 4>}
    %shim1 = aie.tile(1, 0)
    %mem = aie.tile(0, 1)
    %core = aie.tile(0, 2)
    %east = aie.tile(1, 2)

    %free = aie.lock(%core, 0) {init = 1 : i32, sym_name = "free"}
    %full = aie.lock(%core, 1) {init = 0 : i32}
    %unnumbered = aie.lock(%core)
    %mem_free = aie.lock(%mem, 0) {init = 2 : i32}
    %mem_full = aie.lock(%mem, 1) {init = 0 : i32}
    %east_full = aie.lock(%east, 0) {init = 0 : i32}

    %in = aie.buffer(%core) {sym_name = "in"} : memref<64xi32>
    %bias = aie.buffer(%core) {address = 4096 : i32, sym_name = "bias"} : memref<64xi32, 2 : i32>
    %table = aie.buffer(%core) {sym_name = "table"} : memref<4xi32> = dense<[1, 2, 3, 4]>
    %out = aie.buffer(%east) {mem_bank = 1 : i32, sym_name = "out"} : memref<64xi32>
    %stage = aie.buffer(%mem) {sym_name = "stage"} : memref<16x16xi32>

    aie.flow(%shim, DMA : 0, %mem, DMA : 0)
    aie.flow(%mem, "DMA" : 0, %core, "DMA" : 0)
    aie.flow(%mem, DMA : 1, %core, DMA : 1)
    aie.flow(%east, DMA : 0, %shim1, DMA : 0)
    aie.cascade_flow(%core, %east)
    aie.packet_flow(0x3) {
      aie.packet_source<%core, Trace : 0>
      aie.packet_dest<%shim, DMA : 1>
    } {keep_pkt_header = true}
    aie.packet_flow(4) {
      aie.packet_source<%shim, TileControl : 0>
      aie.packet_dest<%shim, South : 0>
      aie.end
    }

    %program = aie.core(%core) {
      %c0 = arith.constant 0 : index
      %c1 = arith.constant 1 : index
      %c64 = arith.constant 64 : index
      cf.br ^again
    ^again:
      aie.use_lock(%full, AcquireGreaterEqual, 1)
      scf.for %i = %c0 to %c64 step %c1 {
        %a = memref.load %in[%i] : memref<64xi32>
        %b = memref.load %bias[%i] : memref<64xi32, 2 : i32>
        %s = arith.addi %a, %b : i32
        memref.store %s, %in[%i] : memref<64xi32>
      }
      func.call @add(%in, %bias) : (memref<64xi32>, memref<64xi32, 2 : i32>) -> ()
      aie.use_lock(%free, Release)
      cf.br ^again
    } {elf_file = "core.elf", stack_size = 2048 : i32}

    %mem_core = aie.mem(%core) {
      %first = aie.dma_start(S2MM, 0, ^fill, ^second)
    ^fill:
      aie.use_lock(%free, AcquireGreaterEqual, 1)
      aie.dma_bd(%in : memref<64xi32>, 0, 64, [<size = 4, stride = 16>, <size = 16, stride = 1>])
      aie.use_lock(%full, Release, 1)
      aie.next_bd ^fill
    ^second:
      %other = aie.dma_start(S2MM, 1, ^bias, ^end, repeat_count = 3)
    ^bias:
      aie.dma_bd(%bias : memref<64xi32, 2 : i32>) {bd_id = 4 : i32, len = 64 : i32}
      aie.next_bd ^end
    ^end:
      aie.end
    }

    %mem_east = aie.mem(%east) {
      %send = aie.dma(MM2S, 0) {loop = false, repeat_count = 1 : i32} [{
        aie.use_lock(%east_full, AcquireGreaterEqual, 1)
        aie.dma_bd(%out : memref<64xi32>, 0, 64) {packet = #aie.packet_info<pkt_id = 3, pkt_type = 0>}
      }]
      aie.end
    }

    %mem_dma = aie.memtile_dma(%mem) {
      %take = aie.dma(S2MM, 0) [{
        aie.use_lock(%mem_free, AcquireGreaterEqual, 1)
        aie.dma_bd(%stage : memref<16x16xi32>, 0, 128)
        aie.use_lock(%mem_full, Release, 1)
      }, {
        aie.use_lock(%mem_free, AcquireGreaterEqual, 1)
        aie.dma_bd(%stage : memref<16x16xi32>, 128, 128)
        aie.use_lock(%mem_full, Release, 1)
      }]
      %give = aie.dma(MM2S, 0) [{
        aie.use_lock(%mem_full, AcquireGreaterEqual, 1)
        aie.dma_bd(%stage : memref<16x16xi32>, 0, 64, [<size = 4, stride = 64>, <size = 4, stride = 16>, <size = 3, stride = 1>], [<const_pad_before = 0, const_pad_after = 0>, <const_pad_before = 0, const_pad_after = 0>, <const_pad_before = 0, const_pad_after = 1>])
        aie.use_lock(%mem_free, Release, 1)
      }]
      %give_bias = aie.dma(MM2S, 1) [{
        aie.dma_bd(%stage : memref<16x16xi32>, 4, 64, [<size = 4, stride = 64>, <size = 4, stride = 16>, <size = 4, stride = 1>]) {bd_id = 24 : i32}
      }]
      aie.end
    }

    aie.shim_dma_allocation @to_array(%shim, MM2S, 0)
    aie.shim_dma_allocation @from_array(%shim1, S2MM, 0)

    aie.runtime_sequence @sequence(%a : memref<256xi32>, %b : memref<128xi32>) {
      %zero = arith.constant 0 : i64
      %one = arith.constant 1 : i64
      %half = arith.constant 128 : i64
      %data = memref.get_global @words : memref<8xi32>
      aiex.npu.blockwrite(%data) {address = 0x1d020 : ui32, column = 0 : i32, row = 0 : i32} : memref<8xi32>
      aiex.npu.address_patch {addr = 0x1d024 : ui32, arg_idx = 1 : i32, arg_plus = 16 : i32}
      aiex.npu.maskwrite32 {address = 0x1d210 : ui32, column = 0 : i32, row = 0 : i32, mask = 0xF00 : ui32, value = 0x400 : ui32}
      aiex.npu.write32 {buffer = @bias, address = 1 : ui32, value = 5 : ui32}
      aiex.npu.rtp_write(@table, 3, -7)
      aiex.set_lock(%full, 0)
      aiex.npu.dma_memcpy_nd(%b[%zero, 0, 0, 0][%one, 1, 1, %half][0, 0, 0, 1]) {id = 0 : i64, issue_token = true, metadata = @from_array} : memref<128xi32>
      aiex.npu.dma_memcpy_nd(%a[0, 0, 0, 0][1, 1, 1, 128][0, 0, 0, 1], packet = <pkt_type = 0, pkt_id = 9>) {burst_length = 64 : i64, id = 1 : i64, metadata = @to_array} : memref<256xi32>
      %task = aiex.dma_configure_task_for @to_array {
        aie.dma_bd(%a : memref<256xi32>, 128, 128, [<size = 1, stride = 0>, <size = 1, stride = 0>, <size = 8, stride = 16>, <size = 16, stride = 1>]) {bd_id = 2 : i32, burst_length = 0 : i32}
        aie.end
      } {issue_token = true, repeat_count = 0 : i32}
      aiex.dma_start_task(%task)
      aiex.dma_await_task(%task)
      aiex.dma_free_task(%task)
      %direct = aiex.dma_configure_task(%shim, S2MM, 1) {
        aie.dma_bd(%b : memref<128xi32>, 0, 64) {bd_id = 3 : i32}
      } {issue_token = true}
      aiex.dma_start_task(%direct)
      aiex.npu.push_queue(0, 0, MM2S : 1) {issue_token = true, repeat_count = 0 : i32, bd_id = 5 : i32}
      aiex.npu.sync {column = 0 : i32, row = 0 : i32, direction = 1 : i32, channel = 1 : i32, column_num = 1 : i32, row_num = 1 : i32}
      aiex.dma_await_task(%direct)
      aiex.npu.dma_wait {symbol = @from_array}
      aiex.npu.preempt {level = 1 : ui8}
      aiex.npu.load_pdi {id = 1 : i32}
    }
  }
}
