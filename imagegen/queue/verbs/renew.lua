-- Renews the leases of entries that a consumer still holds.
--
-- The count of deliveries of the entry of a task with a checkpoint is set to a number that no other entry has. It shows
-- that the task was begun after Redis has evicted the checkpoint: the stream has no expiry, and so goes last.
--
-- KEYS    1 stream; then a checkpoint for each task, or the stream again for a task without one
-- ARGV    1 group; 2 consumer; 3 life of a checkpoint in ms; 4 and 5 the range of entry ids to look at;
--         6 the count of deliveries for entries of begun tasks;
--         then an entry id for each task, all in the range and at most 500
-- result  three lists of entry ids: those that the consumer lost, those that it holds but that are not in ARGV, and those
--         that it holds without their checkpoint, which Redis has lost
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local listed, lost, unlisted, no_checkpoint, held, begun = {}, {}, {}, {}, {}, {}
local list, owned_set = owned(stream, group, consumer, ARGV[4], ARGV[5])
if not list then list, owned_set = {}, {} end
for i = 7, #ARGV do
  local entry = ARGV[i]
  listed[entry] = true
  if owned_set[entry] or owns(stream, group, consumer, entry, list) then
    local checkpoint = KEYS[i - 5]
    if checkpoint == stream then
      held[#held + 1] = entry
    else
      begun[#begun + 1] = entry
      if redis.call('PEXPIRE', checkpoint, ARGV[3]) == 0 then no_checkpoint[#no_checkpoint + 1] = entry end
    end
  else
    lost[#lost + 1] = entry
  end
end
for _, entry in ipairs(list) do if not listed[entry] then unlisted[#unlisted + 1] = entry end end
if #held > 0 then
  held[#held + 1] = 'JUSTID'
  redis.call('XCLAIM', stream, group, consumer, 0, unpack(held))
end
if #begun > 0 then
  for _, option in ipairs({'RETRYCOUNT', ARGV[6], 'JUSTID'}) do begun[#begun + 1] = option end
  redis.call('XCLAIM', stream, group, consumer, 0, unpack(begun))
end
return {lost, unlisted, no_checkpoint}
