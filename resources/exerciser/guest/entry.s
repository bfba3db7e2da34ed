# Everything the exerciser does at CPL 0.
#
#   start32     PVH entry: 32-bit, paging off, ebx = struct hvm_start_info
#   start64     loads GDT, IDT and TSS, then leaves for ring 3 by iretq; it never comes back
#   vectors     interrupts count and acknowledge; faults are turned into a call of guest_fault in ring 3
#   gate        `ud2` from ring 3: cpuid, rdmsr, wrmsr and hlt
#
# Ring 0 may be interpreted one instruction at a time, so what can be data is data (page tables, I/O bitmap)
# and no SSE, x87 or `int n` is used here. AT&T syntax.

.set CODE32,    0x08
.set CODE64,    0x10
.set DATA,      0x18
.set USER_DATA, 0x20 | 3
.set USER_CODE, 0x28 | 3
.set TSS,       0x30

# Xen ELF note 18, XEN_ELFNOTE_PHYS32_ENTRY: where a PVH loader starts.
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad start32

.section .text.entry, "ax", @progbits
.code32
.global start32
start32:
    cli
    cld
    movl $kernel_stack_top, %esp
    movl %ebx, %edi                         # start info: first argument of guest_start

    movl $tss, %eax                         # the assembler cannot split an address over a descriptor
    movw %ax, gdt_tss + 2
    shrl $16, %eax
    movb %al, gdt_tss + 4
    movb $0x89, gdt_tss + 5                 # not busy, also where a reset leaves memory as it was
    movb %ah, gdt_tss + 7
    lgdt gdt_pointer

    movl %cr4, %eax
    orl $0x620, %eax                        # PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE
    movl %eax, %cr4
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx                  # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $~0xc, %eax                        # not EM, not TS
    orl $0x80000023, %eax                   # PG, NE, MP, PE
    movl %eax, %cr0
    ljmp $CODE64, $start64

.code64
start64:
    movl $DATA, %eax
    movl %eax, %ss
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs

    movl $vectors, %eax                     # 256 stubs of 16 bytes -> 256 gates of 16 bytes
    movl $idt, %edx
    movl $256, %ecx
1:  movw %ax, (%rdx)
    movl $CODE64 | 0x8e000000, 2(%rdx)      # selector; interrupt gate, DPL 0, present
    movl %eax, %ebx
    shrl $16, %ebx
    movw %bx, 6(%rdx)
    addl $16, %eax
    addl $16, %edx
    decl %ecx
    jnz 1b
    lidt idt_pointer
    movl $TSS, %eax
    ltr %ax

    pushq $USER_DATA
    pushq $user_stack_top - 8               # rsp % 16 == 8, as after a call
    pushq $0x202                            # IF
    pushq $USER_CODE
    pushq $guest_start
    iretq

# One stub a vector: error code (0 where the processor pushes none), vector.
    .balign 16
vectors:
    .set vector, 0
    .rept 256
    .balign 16
    .if (vector != 8) && ((vector < 10) || (vector > 14)) && (vector != 17) && (vector != 21) && (vector != 29) && (vector != 30)
    pushq $0
    .endif
    pushq $vector
    jmp common
    .set vector, vector + 1
    .endr

# Stack: rax, vector, error code, rip, cs, rflags, rsp, ss.
common:
    pushq %rax
    movq 8(%rsp), %rax
    cmpl $32, %eax
    jb exception
    lock incq interrupt_counts(, %rax, 8)
    lock incq interrupt_total
    cmpl $0xff, %eax                        # a spurious interrupt is not acknowledged
    je 1f
    movl $0xfee000b0, %eax                  # local APIC, end of interrupt
    movl $0, (%rax)
1:  popq %rax
    addq $16, %rsp
    iretq

exception:
    cmpl $6, %eax
    jne fault
    cmpq $gate, 24(%rsp)                    # the one `ud2` that is a request; any other is an abort
    je serve
fault:
    movq %rax, fault_record
    movq 16(%rsp), %rax
    movq %rax, fault_record + 8             # error code
    movq 24(%rsp), %rax
    movq %rax, fault_record + 16            # rip
    movq %cr2, %rax
    movq %rax, fault_record + 24            # faulting address
    movq 32(%rsp), %rax
    movq %rax, fault_record + 32            # cs
    pushq $USER_DATA
    pushq $fault_stack_top - 8
    pushq $2                                # IF stays off
    pushq $USER_CODE
    pushq $guest_fault
    iretq

# rdi: what; rsi: four 64-bit values rax, rbx, rcx, rdx.
serve:
    pushq %rbx
    pushq %rcx
    pushq %rdx
    cmpl $0, %edi
    je serve_cpuid
    cmpl $1, %edi
    je serve_read_msr
    cmpl $2, %edi
    je serve_write_msr
    movq (%rsi), %rax                       # anything else: halt, unless interrupts came since rax was read
    cmpq %rax, interrupt_total
    jne served
    sti                                     # takes effect after hlt has begun: no wake-up is lost
    hlt
    cli
    jmp served
serve_cpuid:
    movl (%rsi), %eax
    movl 16(%rsi), %ecx
    cpuid
    jmp store
serve_read_msr:
    movl 16(%rsi), %ecx
    rdmsr
    jmp store
serve_write_msr:
    movl (%rsi), %eax
    movl 16(%rsi), %ecx
    movl 24(%rsi), %edx
    wrmsr
    jmp served
store:
    movq %rax, (%rsi)
    movq %rbx, 8(%rsi)
    movq %rcx, 16(%rsi)
    movq %rdx, 24(%rsi)
served:
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    addq $16, %rsp
    addq $2, (%rsp)                         # past the `ud2`
    iretq

# extern "C" fn gate(what: u64, registers: *mut [u64; 4]), called from ring 3.
.global gate
gate:
    ud2
    ret

.section .data.entry, "aw", @progbits
    .balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff                # CODE32
    .quad 0x00af9b000000ffff                # CODE64
    .quad 0x00cf93000000ffff                # DATA
    .quad 0x00cff3000000ffff                # USER_DATA
    .quad 0x00affb000000ffff                # USER_CODE
gdt_tss:
    .word tss_end - tss - 1, 0
    .byte 0, 0x89, 0, 0
    .quad 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt

# Task state: the stack of ring 0, and an I/O permission bitmap that allows ring 3 every port.
    .balign 16
tss:
    .long 0
    .quad kernel_stack_top
    .fill 90, 1, 0
    .word io_bitmap - tss
io_bitmap:
    .fill 8192, 1, 0
    .byte 0xff
tss_end:

# Identity map of 4 GiB by 2 MiB pages: present, writable, user, accessed, dirty.
    .balign 4096
page_map:
    .quad page_directories + 0x67
    .fill 511, 8, 0
page_directories:
    .quad pages + 0x0067, pages + 0x1067, pages + 0x2067, pages + 0x3067
    .fill 508, 8, 0
pages:
    .set address, 0
    .rept 2048
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr

.section .bss.entry, "aw", @nobits
    .balign 4096
idt:
    .skip 256 * 16
.global interrupt_counts
interrupt_counts:
    .skip 256 * 8
.global interrupt_total
interrupt_total:
    .skip 8
.global fault_record
fault_record:
    .skip 5 * 8
    .balign 16
    .skip 0x4000
kernel_stack_top:
    .skip 0x8000
fault_stack_top:
    .skip 0x40000
user_stack_top:
